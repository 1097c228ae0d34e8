"""Secret sums at the server: who is in one, the answers that add up, and the exchange that opens it."""
