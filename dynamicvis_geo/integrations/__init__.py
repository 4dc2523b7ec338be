"""Other frameworks' ways to the backbone; each module is imported on request."""
