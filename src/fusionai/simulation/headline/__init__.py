"""Fifty RTX 3080 against four H100: for which models, links and codecs the two are alike, and for which not."""
