"""What a framework's own way of adding code asks for; each file is imported by its framework alone."""
