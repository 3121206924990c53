//! A value that fits a JSON schema (draft 2020-12) as structured output and tools use it. Knows nothing of who asks for it.
//! A `pattern` is not looked at, nor what `not`, `if`, `contains` or `uniqueItems` demand.

use std::collections::BTreeSet;

use percent_encoding::percent_decode_str;
use serde_json::{Map, Value, json};

/// Nesting to which a schema is followed.
const DEEPEST: usize = 32;
/// The most items of an array that are given.
const MOST_ITEMS: usize = 1000;
/// Bytes that are said for a schema, about. In the second half of them only what is required is said; what is required
/// beyond that is null or left out.
const LONGEST: usize = 64 * 1024;

/// The simplest value that has everything in it: each property, and an item of each array. Null where each one would
/// contain itself, or is nested too deeply.
pub fn instance(schema: &Value) -> Value {
    Maker { root: schema, open: Vec::new(), depth: 0, left: LONGEST }.inner(vec![schema]).unwrap_or_default()
}

struct Maker<'a> {
    root: &'a Value,
    /// References that are being followed, and at which depth.
    open: Vec<(usize, &'a str)>,
    depth: usize,
    left: usize,
}

/// The schemas that one value must fit, all of them.
type Parts<'a> = Vec<&'a Value>;

impl<'a> Maker<'a> {
    /// A value within another one. `None`: it would contain itself, by a reference that is being followed, or is nested too
    /// deeply.
    fn inner(&mut self, parts: Parts<'a>) -> Option<Value> {
        if !self.afford(8) {
            return Some(Value::Null);
        }
        self.deeper(parts, 0)
    }

    fn deeper(&mut self, parts: Parts<'a>, next: usize) -> Option<Value> {
        if self.depth > DEEPEST {
            return None;
        }
        self.depth += 1;
        let open = self.open.len();
        let value = self.fit(parts, next);
        self.open.truncate(open);
        self.depth -= 1;
        value
    }

    /// A value that fits the parts, and what those refer to or are put together of, from the one at `next` on.
    fn fit(&mut self, mut parts: Parts<'a>, mut next: usize) -> Option<Value> {
        while let Some(part) = parts.get(next).copied() {
            next += 1;
            if !self.afford(8) {
                return Some(Value::Null);
            }
            if let Some(reference) = part["$ref"].as_str() {
                match self.open.iter().find(|(_, other)| *other == reference) {
                    Some((depth, _)) if *depth < self.depth => return None,
                    Some(_) => {}
                    None => {
                        self.open.push((self.depth, reference));
                        parts.extend(self.meant(reference));
                    }
                }
            }
            parts.extend(part["allOf"].as_array().into_iter().flatten());
            if let Some(choices) = part["anyOf"].as_array().or(part["oneOf"].as_array()) {
                return choices.iter().find_map(|choice| match self.afford(parts.len()) {
                    true => self.deeper([&parts[..], &[choice]].concat(), next),
                    false => Some(Value::Null),
                });
            }
        }
        self.value(&parts)
    }

    fn meant(&mut self, reference: &str) -> Option<&'a Value> {
        // As a part of a URI it may be percent-encoded (RFC 6901, section 6).
        let pointer = percent_decode_str(reference.strip_prefix('#')?).decode_utf8_lossy();
        if self.afford(reference.len()) { self.root.pointer(&pointer) } else { None }
    }

    fn value(&mut self, parts: &[&'a Value]) -> Option<Value> {
        let constant = parts.iter().find_map(|part| part.get("const").or(part["enum"].get(0)));
        if let Some(constant) = constant {
            return Some(if self.afford(constant.to_string().len()) { constant.clone() } else { Value::Null });
        }
        let kind = parts.iter().find_map(|part| part["type"].as_str().or(part["type"][0].as_str()));
        Some(match kind {
            Some("string") => self.text(parts).into(),
            Some("integer" | "number") => number(parts),
            Some("boolean") => json!(true),
            Some("null") => Value::Null,
            Some("array") => self.items(parts)?.into(),
            _ => self.fields(parts)?.into(),
        })
    }

    /// As many items as must be, and one where there may be one.
    fn items(&mut self, parts: &[&'a Value]) -> Option<Vec<Value>> {
        // An older name of the same.
        let first = |part: &'a Value| part["prefixItems"].as_array().or(part["items"].as_array());
        let item = |at: usize| -> Parts<'a> {
            let of_part = |part: &&'a Value| first(part).and_then(|first| first.get(at)).or(part.get("items"));
            parts.iter().filter_map(of_part).filter(|schema| schema.is_object()).collect()
        };
        let most = limit(parts, "maxItems", f64::min).map_or(MOST_ITEMS, |most| most as usize);
        let firsts = parts.iter().filter_map(|part| first(part)).map(Vec::len).max().unwrap_or(0);
        let least = (limit(parts, "minItems", f64::max).unwrap_or(0.0) as usize).max(firsts).min(MOST_ITEMS);
        let wanted = if self.is_frugal() || item(least).is_empty() { least } else { least.max(1) };
        let mut items = Vec::new();
        while items.len() < wanted.min(most) && self.left > 0 {
            match self.inner(item(items.len())) {
                Some(value) => items.push(value),
                None if items.len() >= least => break,
                None => return None,
            }
        }
        Some(items)
    }

    /// The properties that the schemas know, and what else they require.
    fn fields(&mut self, parts: &[&'a Value]) -> Option<Map<String, Value>> {
        let known: Vec<&'a Map<String, Value>> = parts.iter().filter_map(|part| part["properties"].as_object()).collect();
        let required = |part: &&'a Value| part["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
        // Read anew for each object.
        if !self.afford(parts.iter().filter_map(|part| part["required"].as_array()).map(Vec::len).sum()) {
            return Some(Map::new());
        }
        let required: BTreeSet<&'a str> = parts.iter().flat_map(required).collect();
        // What is passed over costs nothing, and there may be much of it.
        let offered = if self.is_frugal() { &[][..] } else { &known };
        let names = offered.iter().flat_map(|known| known.keys().map(String::as_str)).chain(required.iter().copied());
        let mut object = Map::new();
        for name in names {
            let is_required = required.contains(name);
            if object.contains_key(name) || self.is_frugal() && !is_required {
                continue;
            }
            if !self.afford(name.len()) {
                break;
            }
            let mut schemas: Parts<'a> = known.iter().filter_map(|known| known.get(name)).collect();
            if schemas.is_empty() {
                schemas.extend(parts.iter().filter_map(|part| part.get("additionalProperties")));
            }
            match self.inner(schemas) {
                Some(value) => drop(object.insert(name.to_string(), value)),
                None if is_required => return None,
                None => {}
            }
        }
        Some(object)
    }

    /// A text of the format that a schema names (JSON Schema, validation, section 7.3), or of the length.
    fn text(&mut self, parts: &[&'a Value]) -> String {
        let of_format = parts.iter().find_map(|part| match part["format"].as_str()? {
            "date-time" => Some("2000-01-01T00:00:00Z"),
            "date" => Some("2000-01-01"),
            "time" => Some("00:00:00Z"),
            "duration" => Some("P1D"),
            "email" | "idn-email" | "name-email" => Some("mock@example.com"),
            "hostname" | "idn-hostname" => Some("example.com"),
            "uri" | "iri" | "url" => Some("https://example.com/"),
            // Of addresses, networks and interfaces, as Pydantic names them; and of each version.
            format if format.starts_with("ipv6") => Some("::1"),
            format if format.starts_with("ipv") => Some("127.0.0.1"),
            format => format.starts_with("uuid").then_some("00000000-0000-4000-8000-000000000000"),
        });
        if let Some(text) = of_format {
            return text.to_string();
        }
        let least = limit(parts, "minLength", f64::max).map_or(0, |least| least as usize);
        let most = limit(parts, "maxLength", f64::min).map_or(usize::MAX, |most| most as usize);
        let length = 4.max(least).min(most);
        if self.afford(length) { "mock".chars().cycle().take(length).collect() } else { String::new() }
    }

    fn is_frugal(&self) -> bool {
        self.left < LONGEST / 2
    }

    /// Takes `cost` of what is left; false: that is not enough, and there is nothing left for others either.
    fn afford(&mut self, cost: usize) -> bool {
        let rest = self.left.checked_sub(cost);
        self.left = rest.unwrap_or(0);
        rest.is_some()
    }
}

/// The limit of this name that says most, where the schemas have any.
fn limit(parts: &[&Value], name: &str, stricter: fn(f64, f64) -> f64) -> Option<f64> {
    parts.iter().filter_map(|part| part[name].as_f64()).reduce(stricter)
}

/// A number within the schemas' limits (JSON Schema, validation, section 6.2): the least, or 0, or what comes next to it.
fn number(parts: &[&Value]) -> Value {
    let least = limit(parts, "minimum", f64::max).unwrap_or(f64::NEG_INFINITY);
    let above = limit(parts, "exclusiveMinimum", f64::max).unwrap_or(f64::NEG_INFINITY);
    let most = limit(parts, "maximum", f64::min).unwrap_or(f64::INFINITY);
    let below = limit(parts, "exclusiveMaximum", f64::min).unwrap_or(f64::INFINITY);
    let step = limit(parts, "multipleOf", f64::max).filter(|step| *step > 0.0).unwrap_or(1.0);
    let (low, high) = (least.max(above), most.min(below));
    // Three tenths are 3 / 10: 3 * 0.1 is a little more.
    let parts_of_one = (1.0 / step).round();
    let is_fraction = parts_of_one > 1.0 && (parts_of_one * step - 1.0).abs() < 1e-9;
    let times = |count: f64| if is_fraction { count / parts_of_one } else { count * step };
    let (up, down) = ((low / step).ceil(), (high / step).floor());
    let candidates = [0.0, times(up), times(up + 1.0), times(down), times(down - 1.0), (low + high) / 2.0];
    let fits = |n: &f64| n.is_finite() && least <= *n && above < *n && *n <= most && *n < below;
    let number = candidates.into_iter().find(fits).unwrap_or(0.0);
    // As it is where it is that: not every whole number is one that a float can be.
    let is_it = |minimum: &&Value| minimum.is_i64() && minimum.as_f64() == Some(number);
    if let Some(exact) = parts.iter().map(|part| &part["minimum"]).find(is_it) {
        return exact.clone();
    }
    // Whole numbers as such, as far as a float knows each: 1.0 is none to every reader.
    if number.fract() == 0.0 && number.abs() < 9e15 { json!(number as i64) } else { json!(number) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schema_gets_what_it_asks_for() {
        let schema = json!({"type":"object","properties":{"a":{"enum":["x"]},"b":{"type":"array","minItems":1,"items":{"type":"boolean"}},"c":{"anyOf":[{"type":"null"}]}}});
        assert_eq!(instance(&schema), json!({"a":"x","b":[true],"c":null}));
    }

    #[test]
    fn formats_lengths_and_limits_are_kept() {
        let said = |schema: Value| instance(&schema);
        for (schema, expected) in [
            (json!({"type": "string", "format": "date-time"}), json!("2000-01-01T00:00:00Z")),
            (json!({"type": "string", "minLength": 6}), json!("mockmo")),
            (json!({"type": "string", "maxLength": 2}), json!("mo")),
            (json!({"type": "string", "minLength": LONGEST + 1}), json!("")),
            (json!({"type": "integer"}), json!(0)),
            (json!({"type": "integer", "minimum": 3}), json!(3)),
            (json!({"type": "integer", "minimum": 8_000_000_000_000_001_i64}), json!(8_000_000_000_000_001_i64)),
            (json!({"type": "integer", "minimum": 9_007_199_254_740_993_i64}), json!(9_007_199_254_740_993_i64)),
            (json!({"type": "integer", "minimum": 1, "exclusiveMinimum": 5}), json!(6)),
            (json!({"type": "integer", "maximum": 10, "exclusiveMaximum": -3}), json!(-4)),
            (json!({"type": "integer", "exclusiveMinimum": 0}), json!(1)),
            (json!({"type": "integer", "exclusiveMinimum": 0, "multipleOf": 5}), json!(5)),
            (json!({"type": "integer", "maximum": -1}), json!(-1)),
            (json!({"type": "integer", "exclusiveMaximum": 0}), json!(-1)),
            (json!({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}), json!(0.5)),
            (json!({"type": "number", "minimum": 0.5, "multipleOf": 0.25}), json!(0.5)),
            (json!({"type": "number", "minimum": 0.3, "multipleOf": 0.1}), json!(0.3)),
            (json!({"type": "number", "exclusiveMinimum": 19.99, "multipleOf": 0.01}), json!(20)),
            (json!({"type": "number", "minimum": 0.15, "maximum": 0.2, "multipleOf": 0.05}), json!(0.15)),
            (json!({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}]}), json!([0, true])),
            (json!({"type": "array", "items": [{"type": "integer"}, {"type": "boolean"}]}), json!([0, true])),
            (json!({"type": "array", "minItems": 20, "items": {"type": "null"}}), json!(vec![Value::Null; 20])),
            (json!({"type": "array", "items": {"type": "boolean"}}), json!([true])),
            (json!({"type": "array", "items": {"type": "boolean"}, "maxItems": 0}), json!([])),
            (json!({"type": "array"}), json!([])),
            (json!({"type": "string", "minLength": 6, "allOf": [{"pattern": "m"}, {"minLength": 5}]}), json!("mockmo")),
            (json!({"type": "string", "anyOf": [{"format": "date"}, {"format": "date-time"}]}), json!("2000-01-01")),
            (json!({"$ref": "#/$defs/n", "minimum": 5, "$defs": {"n": {"type": "integer", "minimum": 3}}}), json!(5)),
            (json!({"$ref": "#/$defs/n", "minimum": 3, "$defs": {"n": {"type": "integer", "minimum": 5}}}), json!(5)),
            (json!({"type": "string", "format": "uuid4"}), json!("00000000-0000-4000-8000-000000000000")),
            (json!({"type": "string", "format": "ipv4network"}), json!("127.0.0.1")),
            (json!({"type": "string", "format": "ipv6interface"}), json!("::1")),
            (json!({"required": ["a"], "additionalProperties": {"type": "integer"}}), json!({"a": 0})),
            (json!({"$ref": "#/$defs/a%20b", "$defs": {"a b": {"const": 1}}}), json!(1)),
            (
                json!({"anyOf": [{"required": ["a"]}], "properties": {"a": {"type": "string"}}, "required": ["b"]}),
                json!({"a": "mock", "b": {}}),
            ),
            (
                json!({"$ref": "#/$defs/m", "properties": {"a": {"const": 1}}, "required": ["b"], "additionalProperties": true,
                       "$defs": {"m": {"properties": {"b": {"const": 2}}}}}),
                json!({"a": 1, "b": 2}),
            ),
            (
                json!({"properties": {"kind": {"type": "string"}, "n": {"type": "integer"}},
                       "oneOf": [{"properties": {"kind": {"const": "a"}}}, {"properties": {"kind": {"const": "b"}}}]}),
                json!({"kind": "a", "n": 0}),
            ),
            (
                json!({"allOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"b": {"const": 2}}}]}),
                json!({"a": 1, "b": 2}),
            ),
        ] {
            assert_eq!(said(schema.clone()), expected, "{schema}");
        }
    }

    /// Before what is in vain cost something, this took hours.
    #[test]
    fn much_in_vain_comes_to_an_end() {
        let (parts, choices) = (vec![0; 20_000], vec![json!({"$ref": "#/b"}); 300]);
        let mut schema = json!({"anyOf": choices});
        for _ in 0..DEEPEST {
            schema = json!({"anyOf": [schema]});
        }
        schema["b"] = json!({"allOf": parts, "anyOf": parts});
        instance(&schema);
        let (objects, required) = (vec![json!({"$ref": "#/b"}); 10_000], vec!["a"; 60_000]);
        instance(&json!({"prefixItems": objects, "b": {"type": "object", "required": required}}));
    }

    #[test]
    fn ten_models_in_each_other_are_followed() {
        let mut definitions = json!({"m10": {"type": "object", "properties": {"end": {"const": "here"}}}});
        for depth in 0..10 {
            let next = json!({"anyOf": [{"$ref": format!("#/$defs/m{}", depth + 1)}]});
            definitions[format!("m{depth}")] = json!({"type": "object", "properties": {"next": next}});
        }
        let schema = json!({"$defs": definitions, "$ref": "#/$defs/m0"});
        let mut model = &instance(&schema);
        while !model["next"].is_null() {
            model = &model["next"];
        }
        assert_eq!(model["end"], "here");
    }

    #[test]
    fn a_chain_ends_as_its_schema_has_it() {
        let schema = json!({"$defs": {"node": {"type": "object", "properties": {"v": {"type": "integer"},
            "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}}, "$ref": "#/$defs/node"});
        let mut node = &instance(&schema);
        while !node.is_null() {
            assert_eq!(node["v"], 0, "{node}");
            node = &node["next"];
        }
    }

    #[test]
    fn a_tree_ends_in_leaves() {
        let tree = json!({"anyOf": [{"type": "object", "properties": {"left": {"$ref": "#"}}, "required": ["left"]}, {"type": "integer"}]});
        let mut node = &instance(&tree);
        while node.is_object() {
            node = &node["left"];
        }
        assert_eq!(*node, json!(0));
    }

    #[test]
    fn what_refers_to_itself_is_said_as_often_as_it_must_be() {
        let own = json!({"$ref": "#/$defs/it"});
        let it = |properties: Value, required: Value| {
            let it = json!({"type": "object", "properties": properties, "required": required});
            instance(&json!({"$ref": "#/$defs/it", "$defs": {"it": it}}))
        };
        let name = json!({"type": "string"});
        assert_eq!(it(json!({"parent": own, "name": name}), json!(["name"])), json!({"name": "mock"}));
        let maybe = json!({"anyOf": [own, {"type": "null"}]});
        let all = json!({"a": maybe, "b": maybe, "c": maybe, "name": name});
        assert_eq!(it(all, json!(["name"])), json!({"a": null, "b": null, "c": null, "name": "mock"}));
        assert_eq!(it(json!({"children": {"type": "array", "items": own}}), json!(["children"])), json!({"children": []}));
        assert_eq!(it(json!({"own": own}), json!(["own"])), Value::Null, "it has no end");
        let filter = json!({"anyOf": [{"$ref": "#/$defs/not"}, {"$ref": "#/$defs/is"}]});
        let not = json!({"type": "object", "properties": {"not": filter}, "required": ["not"]});
        let is = json!({"type": "object", "properties": {"is": name}, "required": ["is"]});
        let mut schema = filter;
        schema["$defs"] = json!({"not": not, "is": is});
        assert_eq!(instance(&schema), json!({"not": {"is": "mock"}}));
    }

    #[test]
    fn much_is_said_where_it_is_required() {
        let fields: Map<String, Value> = (0..12).map(|n| (format!("field_{n}"), json!({"type": "string"}))).collect();
        let row = json!({"type": "object", "required": fields.keys().collect::<Vec<_>>(), "properties": fields});
        let rows = instance(&json!({"type": "array", "minItems": 100, "items": row}));
        let rows = rows.as_array().expect("an array");
        assert_eq!(rows.iter().filter(|row| row.as_object().is_some_and(|row| row.len() == 12)).count(), 100);
        let others: Vec<String> = (0..20).map(|n| format!("m{n}")).collect();
        let model = |own: &String| {
            let others = others.iter().filter(|other| *other != own);
            let mut fields: Map<String, Value> =
                others.map(|other| (other.clone(), json!({"$ref": format!("#/$defs/{other}")}))).collect();
            fields.insert("name".into(), json!({"type": "string"}));
            json!({"type": "object", "properties": fields, "required": ["name"]})
        };
        let definitions: Map<String, Value> = others.iter().map(|own| (own.clone(), model(own))).collect();
        let everything = instance(&json!({"$ref": "#/$defs/m0", "$defs": definitions}));
        assert_eq!(everything["name"], "mock", "what is required comes after all that is not");
    }

    #[test]
    fn a_schema_without_end_gets_an_end() {
        let next = |n: usize| json!({"anyOf": [{"$ref": format!("#/a{n}")}]});
        let mut chain: Value = (0..5000).map(|n| (format!("a{n}"), next(n + 1))).collect::<Map<_, _>>().into();
        chain["$ref"] = json!("#/a0");
        let bare = json!({"type": "array", "minItems": 1000});
        let deep = json!({"type": "array", "minItems": 1000, "items": {"type": "array", "minItems": 1000, "items": bare}});
        for schema in [
            chain,
            deep,
            json!({"type":"array","minItems":16,"items":{"$ref":"#"}}),
            json!({"properties":{"a":{"$ref":"#"},"b":{"$ref":"#"},"c":{"anyOf":[{"$ref":"#"}]}}}),
            json!({"properties":{"a":{"const":"x".repeat(LONGEST)},"b":{"type":"number","minimum":vec![0; LONGEST]}}}),
        ] {
            assert!(instance(&schema).to_string().len() < 2 * LONGEST);
        }
    }
}
