"""What an attacker can learn: one-run auditing, canaries, gradient inversion."""
