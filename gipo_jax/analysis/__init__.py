"""What is made of results: statistics, figures, and the exact studies."""
