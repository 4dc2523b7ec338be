"""Features of the frozen DynamicVis backbone for any place and any date range."""
