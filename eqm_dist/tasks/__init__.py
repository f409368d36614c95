"""What a field can do besides drawing samples."""
