"""How good an edit is: measures of pictures, drift over several turns, benchmarks and their reports."""
