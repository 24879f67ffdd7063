"""The recipe `tax_design`: three VAT rates and an income tax, two households that respond to them.

Modules:
    figures: rates and welfare over time, what households do
"""
