"""Reports: every plot (``plots``) and the one page (``page``) that evaluate, tune and study write."""
