"""What calibration tells people and machines: report.html and report.json."""
