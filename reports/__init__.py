"""What we may say: records to a frame, to tables and figures, to pages. Nothing here imports torch.

    records.jsonl --load--> Record --summary--> one row per point, with its interval
                                   --> tables, figures --> pages --> index.html, report.md

A user's own output lies under reports/out/ (not committed), one reference run under reports/reference/ (committed).
"""
