"""The fast copy of a frozen network: it is traced and folded, and runs without what only training needs."""
