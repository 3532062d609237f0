"""The fast copy of a frozen network: traced, folded, and run without what only training needs."""
