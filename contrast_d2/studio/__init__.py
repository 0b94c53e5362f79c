"""What people look at: pictures, pages, videos, tables, the dashboard. No training needs it."""
