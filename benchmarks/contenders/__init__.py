"""Planners, routers and placements of other systems, for comparison. The package `fusionai` never imports them."""
