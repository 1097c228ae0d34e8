"""What an attacker could learn from an adapter or a message, measured."""
