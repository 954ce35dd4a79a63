"""Pictures, tables, the page and the document; all from stored rows."""
