"""Retraining that starts, judges, promotes and rolls back by itself."""
