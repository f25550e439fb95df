"""pytest alone: options, markers, fixtures, hooks. No domain logic."""
