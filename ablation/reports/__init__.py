"""Reports: text for one prompt and for many, the comparison of two results, and a page to look around in."""
