"""Outputs described as STAC, for catalogues, browsers and people.

Beside an output ``OUT`` lies the folder ``OUT.stac``, a self-contained catalogue:

=================== ================================================================
``collection.json`` a STAC Collection, with the extension for embeddings
``items/*.json``    an Item for each CRS of the chips, such as ``EPSG_32618.json``
``model.json``      the backbone, an Item with the extension for models (MLM)
``provenance.json`` what made the output
``chips.parquet``   where each chip has a file of its own: their names and footprints
=================== ================================================================
"""

from dynamicvis_geo.stac.catalogue import update_stac, write_stac

__all__ = ['update_stac', 'write_stac']
