"""Two reports in one verdict: may the upgrade between them go out?"""
