"""A page that tells of a run: what was made, how, where, and how it looks."""

from dynamicvis_geo.report.page import write_report

__all__ = ['write_report']
