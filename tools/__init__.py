"""Commands for maintainers: GPU test reports and what they vouch for. Not part of the installed package."""
