"""What tools/doctor.py looks at. Only the standard library is imported: the rest may be broken."""
