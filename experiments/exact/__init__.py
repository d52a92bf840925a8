"""Studies whose quantities are computed exactly, from finite problems."""
