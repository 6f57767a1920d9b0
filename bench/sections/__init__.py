"""The report's sections: each turns a run's measurements into sentences, tables and charts (``bench/page.py``)."""
