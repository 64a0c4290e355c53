"""Detectors in the formats of others."""
