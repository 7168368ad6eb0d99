"""Say what a folder holds: tables, pictures, pages, the model card, and the upload to the Hub."""
