//! How JSON from outside is read: field by field, with little kept of what is large, and with patience for what only the
//! history wants. Pure; knows no protocol.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// Parts of a list that are kept, such as choices of an answer and tool calls: no model gives more, and an index beyond is
/// not believed.
pub const MOST_PARTS: usize = 128;

/// Shows every field of a JSON object, in their order, with the bytes of its value. Nothing is kept: a
/// field of a few bytes would take many times its size.
pub fn each_field<'a>(json: &'a [u8], see: impl FnMut(&str, &'a RawValue)) -> serde_json::Result<()> {
    let mut json = serde_json::Deserializer::from_slice(json);
    json.deserialize_map(EachField(see))?;
    json.end()
}

struct EachField<F>(F);

impl<'de, F: FnMut(&str, &'de RawValue)> Visitor<'de> for EachField<F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        while let Some((Name(name), value)) = map.next_entry()? {
            (self.0)(&name, value);
        }
        Ok(())
    }
}

/// Shows every element of a JSON list, in their order. Nothing is kept here, either.
pub fn each_element<'a, T: Deserialize<'a>>(list: &'a str, see: impl FnMut(T)) -> serde_json::Result<()> {
    serde_json::Deserializer::from_str(list).deserialize_seq(EachElement(see, PhantomData))
}

struct EachElement<F, T>(F, PhantomData<T>);

impl<'de, T: Deserialize<'de>, F: FnMut(T)> Visitor<'de> for EachElement<F, T> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<(), A::Error> {
        while let Some(element) = list.next_element()? {
            (self.0)(element);
        }
        Ok(())
    }
}

/// A field's name.
#[derive(Deserialize)]
pub struct Name<'a>(#[serde(borrow)] pub Cow<'a, str>);

/// A string, borrowed where it stands in the JSON as it is. Of halves of characters (`"\ud83d"`), which servers write
/// that cut a text into UTF-16 units, replacement characters are left.
#[derive(Default)]
pub struct Words<'a>(pub Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Words<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Words<'a>, D::Error> {
        // As a string it would have to be whole.
        deserializer.deserialize_bytes(Words::default())
    }
}

impl<'de> Visitor<'de> for Words<'de> {
    type Value = Words<'de>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_borrowed_bytes<E>(self, text: &'de [u8]) -> Result<Words<'de>, E> {
        // Whole texts are checked several times faster so.
        Ok(Words(std::str::from_utf8(text).map_or_else(|_| String::from_utf8_lossy(text), Cow::Borrowed)))
    }

    fn visit_bytes<E>(self, text: &[u8]) -> Result<Words<'de>, E> {
        Ok(Words(String::from_utf8_lossy(text).into_owned().into()))
    }
}

/// A value that only the history wants, so that one of another type than it should have is none.
pub struct Wish<T>(pub Option<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Wish<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Wish<T>, D::Error> {
        let json = <&RawValue>::deserialize(deserializer)?.get();
        // In most chunks most are null, and an error would be made of each.
        Ok(Wish(if json == "null" { None } else { wished(json) }))
    }
}

// Not inlined: what all the wishes of a chunk take of the stack each stream would keep, another page.
#[inline(never)]
pub fn wished<'a, T: Deserialize<'a>>(json: &'a str) -> Option<T> {
    serde_json::from_str(json).ok()
}

/// The first `MOST_PARTS` of a list. The others are read and not kept: an empty one takes a hundred times its bytes.
pub struct Few<T>(pub Vec<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Few<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Few<T>, D::Error> {
        // Most have one element, and a Vec begins with four.
        let mut few = Vec::with_capacity(1);
        let keep = |element| {
            if few.len() < MOST_PARTS {
                few.push(element);
            }
        };
        deserializer.deserialize_seq(EachElement(keep, PhantomData))?;
        Ok(Few(few))
    }
}

/// Reads JSON objects into a struct whose fields have their names, the `wishes` as values that only the history wants. Other
/// fields are passed over, of doubled ones the last counts, and a list is no object: what serde derives would take its
/// elements for the fields.
macro_rules! object {
    ($name:ty { $($field:ident),* } wishes { $($wish:ident),* }) => {
        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<$name, D::Error> {
                struct Fields;

                impl<'de> serde::de::Visitor<'de> for Fields {
                    type Value = $name;

                    fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                        f.write_str("an object")
                    }

                    fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<$name, A::Error> {
                        let mut object = <$name>::default();
                        while let Some($crate::json::Name(name)) = map.next_key()? {
                            match &*name {
                                $(stringify!($field) => object.$field = map.next_value()?,)*
                                $(stringify!($wish) => object.$wish = map.next_value::<$crate::json::Wish<_>>()?.0,)*
                                _ => drop(map.next_value::<serde::de::IgnoredAny>()?),
                            }
                        }
                        Ok(object)
                    }
                }
                deserializer.deserialize_map(Fields)
            }
        }
    };
}
pub(crate) use object;
