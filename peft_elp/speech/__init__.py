"""Recordings in, answers out: reading and checking audio, data sets, metrics, speakers, inference and plots."""
