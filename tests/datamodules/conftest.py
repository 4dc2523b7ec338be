from tests.earthengine_server.fixtures import running_server, server

__all__ = ('running_server', 'server')
