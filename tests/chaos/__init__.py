"""Tests that run for minutes and do everything at random. Their oracle is tested in
``tests/unit/chaos``; a short version of each is among the integration tests."""
