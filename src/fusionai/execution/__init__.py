"""Execution planes: each runs sub-DAGs in one framework, behind one interface."""
