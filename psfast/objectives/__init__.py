"""Objectives: one file a backend."""
