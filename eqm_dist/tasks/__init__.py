"""What a trained field can do besides drawing images from noise, and what it looks like on a plane."""
