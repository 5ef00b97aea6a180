"""Forecasts of a run: memory, time and traffic."""
