"""Clients and a center over a network, on Flower: concepts travel, pictures stay. See docs/federation.md."""
