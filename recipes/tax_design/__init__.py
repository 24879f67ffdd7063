"""The recipe `tax_design`: three VAT rates and an income tax, two households that respond to them."""
