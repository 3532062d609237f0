#include "parse.h"

#include <algorithm>
#include <cstdlib>

namespace ptx_on_cpu {

std::string_view trimmed(std::string_view text) {
  const auto first = text.find_first_not_of(" \t\r\n");
  if (first == text.npos) return {};
  return text.substr(first, text.find_last_not_of(" \t\r\n") - first + 1);
}

bool starts(std::string_view text, std::string_view with) { return text.substr(0, with.size()) == with; }

std::vector<std::string_view> split(std::string_view text, char at) {
  std::vector<std::string_view> parts;
  for (;;) {
    const auto end = text.find(at);
    parts.push_back(trimmed(text.substr(0, end)));
    if (end == text.npos) return parts;
    text.remove_prefix(end + 1);
  }
}

namespace {

int width_of_type(std::string_view type) {
  if (type == "pred") return 1;
  const int bits = std::atoi(std::string(type.substr(1)).c_str());
  if (bits != 8 && bits != 16 && bits != 32 && bits != 64) throw Fault("unknown type ." + std::string(type));
  return bits / 8;
}

// ".shared .align 16 .b8 name[24576]" or ".param .u64 name"
Variable variable(std::string_view text) {
  Variable v{};
  std::string_view type;
  for (std::string_view word : split(text, ' ')) {
    if (word.empty()) continue;
    if (word == ".extern")
      v.external = true;
    else if (word == ".shared")
      v.space = Space::shared;
    else if (word == ".param")
      v.space = Space::param;
    else if (word == ".local")
      v.space = Space::local;
    else if (word == ".align")
      v.align = 0;
    else if (v.align == 0)
      v.align = uint32_t(std::atoi(std::string(word).c_str()));
    else if (word[0] == '.')
      type = word.substr(1);
    else
      v.name = word;
  }
  if (v.name.empty() || type.empty()) throw Fault("cannot read the variable " + std::string(text));
  v.bytes = uint32_t(width_of_type(type));
  v.align = std::max(v.align, v.bytes);
  const auto bracket = v.name.find('[');
  if (bracket != v.name.npos) {
    v.bytes *= uint32_t(std::strtoul(std::string(v.name.substr(bracket + 1)).c_str(), nullptr, 10));
    v.name = v.name.substr(0, bracket);
  }
  return v;
}

// ".reg .b32 %r<79>" or ".reg .b32 %a, %b"
void registers(std::string_view text, std::vector<Register>* out) {
  text = trimmed(text.substr(4));
  const auto space = text.find_first_of(" \t");
  const int width = width_of_type(text.substr(1, space - 1));
  for (std::string_view name : split(text.substr(space), ',')) {
    const auto angle = name.find('<');
    const int count = angle == name.npos ? 0 : std::atoi(std::string(name.substr(angle + 1)).c_str());
    out->push_back({name.substr(0, angle), count, width});
  }
}

void operands(std::string_view text, Statement* s) {
  bool braces = false, counted = false;
  size_t from = 0;
  const auto take = [&](size_t end) {
    const std::string_view piece = trimmed(text.substr(from, end - from));
    from = end + 1;
    if (piece.empty()) return;
    for (std::string_view part : split(piece, '|')) {
      s->operands.push_back(part);
      s->vector += braces && !counted;
    }
  };
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == ',') take(i);
    if (text[i] == '{') {
      if (!counted) s->vector_first = s->operands.empty();
      braces = true;
      from = i + 1;
    }
    if (text[i] == '}') {
      take(i);
      counted = true;
      braces = false;
    }
  }
  take(text.size());
}

Statement instruction(std::string_view text, uint32_t line) {
  Statement s;
  s.line = line;
  if (text[0] == '@') {
    const auto end = text.find_first_of(" \t");
    s.guard = text.substr(1, end - 1);
    s.guard_negated = s.guard[0] == '!';
    s.guard.remove_prefix(s.guard_negated);
    text = trimmed(text.substr(end));
  }
  const auto end = std::min(text.find_first_of(" \t"), text.size());
  s.opcode = text.substr(0, end);
  operands(text.substr(end), &s);
  return s;
}

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Source run() {
    for (skip(); at_ < text_.size(); skip()) {
      if (is_word(".visible") || is_word(".weak"))
        until(" \t\n");
      else if (is_word(".version") || is_word(".target") || is_word(".address_size"))
        until("\n");
      else if (is_word(".entry"))
        function();
      else if (is_word(".shared") || is_word(".extern .shared"))
        source_.variables.push_back(variable(until(";")));
      else if (is_word(".file"))
        file(until("\n"));
      else if (is_word(".section"))
        until("}");  // names for debuggers
      else
        fail("does not know what begins here");
    }
    return std::move(source_);
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw Fault("line " + std::to_string(line_) + ": " + what + ": " +
                std::string(text_.substr(at_, std::min<size_t>(text_.size() - at_, 60))));
  }
  bool is_word(std::string_view word) const {
    const size_t end = at_ + word.size();
    return text_.substr(at_, word.size()) == word &&
           (end >= text_.size() || std::string_view(" \t\n").find(text_[end]) != std::string_view::npos);
  }
  void skip() {  // white space and comments
    for (;; ++at_) {
      if (starts(text_.substr(at_), "//")) at_ = std::min(text_.find('\n', at_), text_.size());
      if (at_ >= text_.size() || std::string_view(" \t\r\n").find(text_[at_]) == std::string_view::npos) return;
      line_ += text_[at_] == '\n';
    }
  }
  // What stands before the next of these characters, which is passed.
  std::string_view until(std::string_view ends) {
    const size_t from = at_;
    at_ = text_.find_first_of(ends, at_);
    if (at_ == text_.npos) fail("the text ends too soon");
    line_ += uint32_t(std::count(text_.begin() + long(from), text_.begin() + long(at_) + 1, '\n'));
    return trimmed(text_.substr(from, at_++ - from));
  }

  void function() {
    Function f;
    at_ += 6;
    f.name = until("(");
    for (std::string_view param : split(until(")"), ','))
      if (!param.empty()) f.params.push_back(variable(param));
    for (skip(); text_[at_] != '{'; skip()) {
      if (is_word(".maxntid"))
        f.most_threads = maxntid(until("\n"));
      else if (is_word(".minnctapersm") || is_word(".reqntid"))
        until("\n");
      else
        fail("does not know this property of an entry");
    }
    int depth = 0;
    do {
      skip();
      if (text_[at_] == '{')
        ++depth, ++at_;
      else if (text_[at_] == '}')
        --depth, ++at_;
      else
        statement(&f);
    } while (depth);
    source_.functions.push_back(std::move(f));
  }
  // .file 1 "name"
  void file(std::string_view text) {
    const auto quote = text.find('"');
    source_.files[number(text.substr(6))] = text.substr(quote + 1, text.rfind('"') - quote - 1);
  }
  // .loc file line column[, function_name ..., inlined_at ...]
  void location(std::string_view text) {
    std::vector<std::string_view> words = split(text.substr(5), ' ');
    file_ = number(words.at(0));
    source_line_ = number(words.at(1));
  }
  static uint32_t number(std::string_view text) {
    return uint32_t(std::strtoul(std::string(trimmed(text)).c_str(), nullptr, 10));
  }
  static uint32_t maxntid(std::string_view text) {
    uint32_t product = 1;
    for (std::string_view n : split(text.substr(8), ',')) product *= number(n);
    return product;
  }

  void statement(Function* f) {
    if (is_word(".reg")) return registers(until(";"), &f->registers);
    if (is_word(".shared") || is_word(".local")) return f->variables.push_back(variable(until(";")));
    if (is_word(".loc")) return location(until("\n"));
    if (is_word(".pragma")) return void(until(";"));  // how much to unroll, which bytes of a load are used
    if (text_[at_] == '.') fail("does not know this directive");
    const size_t end = text_.find_first_of(" \t\n:;", at_);
    const uint32_t line = line_;
    if (end != text_.npos && text_[end] == ':') {
      Statement s;
      s.line = line;
      s.label = until(":");
      f->body.push_back(s);
    } else {
      f->body.push_back(instruction(until(";"), line));
      f->body.back().file = file_;
      f->body.back().source_line = source_line_;
    }
  }

  std::string_view text_;
  size_t at_ = 0;
  uint32_t line_ = 1, file_ = 0, source_line_ = 0;
  Source source_;
};

}  // namespace

Source parse(std::string_view text) { return Parser(text).run(); }

}  // namespace ptx_on_cpu
