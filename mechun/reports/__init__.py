"""The report: what saved runs say, as one HTML file that can be mailed, and back from it as data."""
