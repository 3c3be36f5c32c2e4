//! Renders the API description of the API as a web page.

use std::fmt::Write as _;

use serde_json::Value;
use utoipa::openapi::OpenApi;

const HEAD: &str = "<!doctype html>
<html lang=\"en\">
<head>
<meta charset=\"utf-8\">
<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">
<title>Lastseen: the viewer's API</title>
<link rel=\"icon\" href=\"page/icon.svg\" type=\"image/svg+xml\">
<link rel=\"stylesheet\" href=\"page/docs.css\">
</head>
<body>
<main>
";
const FOOT: &str = "</main>\n</body>\n</html>\n";

/// Lists all operations with their parameters and responses, then all schemas.
pub(crate) fn html(document: &OpenApi) -> String {
    // Only a map whose keys are not strings could fail, and derived documents have none.
    let document = serde_json::to_value(document).unwrap_or_default();
    let mut page = HEAD.to_owned();
    let info = &document["info"];
    line(&mut page, "h1", &escaped(&info["title"]));
    line(&mut page, "p", &prose(&info["description"]));
    page.push_str(
        "<p><a href=\"./\">the live page</a> · <a href=\"openapi.json\">openapi.json</a></p>\n",
    );
    for (path, methods) in entries(&document["paths"]) {
        for (method, operation) in entries(methods) {
            let method = method.to_uppercase();
            line(&mut page, "h2", &format!("<code>{method} {}</code>", escape(path)));
            let summary = format!("<strong>{}.</strong>", escaped(&operation["summary"]));
            line(&mut page, "p", &format!("{summary} {}", prose(&operation["description"])));
            parameters(&mut page, &operation["parameters"]);
            responses(&mut page, &operation["responses"]);
        }
    }
    for (name, schema) in entries(&document["components"]["schemas"]) {
        line(&mut page, "h2", &format!("<code>{}</code>", escape(name)));
        line(&mut page, "p", &prose(&schema["description"]));
        let parts = schema["allOf"].as_array().map_or(vec![schema], |parts| parts.iter().collect());
        let properties = parts.iter().flat_map(|part| entries(&part["properties"]));
        let rows: Vec<[String; 3]> = properties
            .map(|(name, schema)| {
                [code(name), code(&type_of(schema)), prose(&schema["description"])]
            })
            .collect();
        table(&mut page, ["field", "type", "meaning"], &rows);
    }
    page + FOOT
}

fn parameters(page: &mut String, parameters: &Value) {
    let parameters = parameters.as_array().map(Vec::as_slice).unwrap_or_default();
    let row = |parameter: &Value| {
        let name = parameter["name"].as_str().unwrap_or_default();
        let name = format!("{} ({})", code(name), escaped(&parameter["in"]));
        [name, code(&type_of(&parameter["schema"])), prose(&parameter["description"])]
    };
    let rows: Vec<[String; 3]> = parameters.iter().map(row).collect();
    table(page, ["parameter", "type", "meaning"], &rows);
}

fn responses(page: &mut String, responses: &Value) {
    let row = |(status, response): (&String, &Value)| {
        let content: Vec<String> = entries(&response["content"])
            .map(|(kind, content)| {
                format!("{}, {}", code(kind), code(&type_of(&content["schema"])))
            })
            .collect();
        [code(status), content.join("; "), prose(&response["description"])]
    };
    let rows: Vec<[String; 3]> = entries(responses).map(row).collect();
    table(page, ["response", "content", "meaning"], &rows);
}

/// A short name of a schema's type, such as `array of integer 1 to 9`.
fn type_of(schema: &Value) -> String {
    if let Some(name) = schema["$ref"].as_str() {
        return name.rsplit('/').next().unwrap_or(name).to_owned();
    }
    let name = match &schema["type"] {
        Value::String(name) => name.clone(),
        Value::Array(names) => {
            names.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" or ")
        }
        _ => return String::new(),
    };
    let of = if schema["items"].is_null() {
        String::new()
    } else {
        format!(" of {}", type_of(&schema["items"]))
    };
    let text = |name: &str| schema[name].as_str().map(|text| format!(" {text}"));
    let rest = text("format").or_else(|| text("pattern")).unwrap_or_default();
    let bounds = match (schema["minimum"].as_i64(), schema["maximum"].as_i64()) {
        (Some(min), Some(max)) => format!(" {min} to {max}"),
        _ => String::new(),
    };
    format!("{name}{of}{rest}{bounds}")
}

fn table(page: &mut String, heads: [&str; 3], rows: &[[String; 3]]) {
    if rows.is_empty() {
        return;
    }
    let heads = heads.map(|head| format!("<th scope=\"col\">{head}</th>")).concat();
    // Writing to a string cannot fail.
    let _ = writeln!(page, "<div class=\"table\"><table>\n<tr>{heads}</tr>");
    for row in rows {
        let cells = row.each_ref().map(|cell| format!("<td>{cell}</td>")).concat();
        let _ = writeln!(page, "<tr>{cells}</tr>");
    }
    page.push_str("</table></div>\n");
}

fn line(page: &mut String, tag: &str, content: &str) {
    let _ = writeln!(page, "<{tag}>{content}</{tag}>");
}

fn entries(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}

fn code(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!("<code>{}</code>", escape(text)) }
}

/// Escapes a text, and marks parts in backticks as code.
fn prose(value: &Value) -> String {
    let text = value.as_str().unwrap_or_default();
    let parts = text.split('`').enumerate();
    parts.map(|(index, part)| if index % 2 == 1 { code(part) } else { escape(part) }).collect()
}

fn escaped(value: &Value) -> String {
    escape(value.as_str().unwrap_or_default())
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_lists_every_operation_parameter_and_field() {
        let page = html(&crate::openapi::document());
        for text in ["GET /objects", "GET /objects/{id}", "GET /stats", "GET /events"] {
            assert!(page.contains(text), "{text}");
        }
        for text in ["seen_within", "Last-Event-ID", "breaker_state", "last_seen", "sightings"] {
            assert!(page.contains(&format!("<code>{text}</code>")), "{text}");
        }
        assert!(!page.contains("<script") && !page.contains("style="), "nothing inline");
    }
}
