"""Answers over HTTP: many adapters on one backbone, for many users."""
