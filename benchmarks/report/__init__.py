"""What readers see of the store: tables, pictures, and the documents that show them."""
