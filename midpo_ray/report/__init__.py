"""Reports: every plot (``plots``), and the one page (``page``) that all commands write."""
