"""The scoring rules by kind; ``scoring.py`` names them."""
