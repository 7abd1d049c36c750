"""Flax modules; they know no loss and no agent."""
