package layering

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/stasis-containers/stasis"

// pkg is one package as go list describes it, without its tests.
type pkg struct {
	ImportPath string
	Imports    []string // direct
	Deps       []string // transitive
}

// rule forbids packages to import others. A name ending in "/..." stands for
// the package and all below it; "./" stands for this module.
type rule struct {
	name   string
	from   []string
	except []string
	to     []string
	direct bool // indirect imports are allowed
	why    string
}

const (
	goCRIU    = "github.com/checkpoint-restore/go-criu/..."
	logrus    = "github.com/sirupsen/logrus"
	runcShim  = "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/..."
	shimPkg   = "github.com/containerd/containerd/v2/pkg/shim"
	osExec    = "os/exec"
	criuLayer = "./pkg/checkpoint/criu"
)

var rules = []rule{
	{name: "shim", from: []string{"./shim/..."}, to: []string{"./nri/...", "./cmd/..."},
		why: "decisions reach the shim as annotations; it never needs the daemon"},
	{name: "nri", from: []string{"./nri/..."}, to: []string{"./shim/...", "./cmd/..."},
		why: "the daemon never touches a process"},
	{name: "pkg", from: []string{"./pkg/..."}, to: []string{"./shim/...", "./nri/...", "./cmd/..."},
		why: "pkg is below both and serves other runtimes as well"},
	{name: "checkpoint", from: []string{"./pkg/checkpoint/..."}, to: []string{"./pkg/restore/..."},
		why: "restoring builds on checkpoints, not the other way round"},
	{name: "vocabulary", from: []string{"./pkg/checkpoint"}, to: []string{
		"./pkg/checkpoint/criu", "./pkg/checkpoint/event", "./pkg/checkpoint/fsys", "./pkg/checkpoint/layer", "./pkg/checkpoint/store"},
		why: "the shared vocabulary knows nothing of who speaks it"},
	{name: "go-criu", from: []string{"./..."}, except: []string{criuLayer}, to: []string{goCRIU}, direct: true,
		why: "one package knows CRIU's formats"},
	{name: "logrus", from: []string{"./..."}, except: []string{"./cmd/..."}, to: []string{logrus}, direct: true,
		why: "libraries log through github.com/containerd/log; only a command chooses the form"},
	{name: "exec", from: []string{"./shim/...", "./pkg/..."}, except: []string{criuLayer}, to: []string{osExec}, direct: true,
		why: "the shim reaps all children of its process, so waiting for one's own child races with it"},
	{name: "shim packages", from: []string{"./pkg/..."}, to: []string{runcShim, shimPkg}, direct: true,
		why: "pkg serves runtimes without containerd's shim as well"},
	{name: "testenv", from: []string{"./cmd/...", "./shim/...", "./nri/...", "./pkg/..."}, to: []string{"./internal/testenv"},
		why: "it is for tests"},
}

func matches(path, pattern string) bool {
	if rest, ok := strings.CutPrefix(pattern, "./"); ok {
		pattern = module + "/" + rest
	}
	if base, ok := strings.CutSuffix(pattern, "/..."); ok {
		return path == base || strings.HasPrefix(path, base+"/")
	}
	return path == pattern
}

func matchesAny(path string, patterns []string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matches(path, p) })
}

// violations applies the rules. A rule that names a package which does not
// exist (any more) guards nothing, and is a violation too.
func violations(pkgs []pkg, rules []rule) (out []string) {
	var known []string
	for _, p := range pkgs {
		known = append(append(known, p.ImportPath), p.Deps...)
	}
	slices.Sort(known)
	known = slices.Compact(known)
	for _, r := range rules {
		for _, pattern := range slices.Concat(r.from, r.except, r.to) {
			if !slices.ContainsFunc(known, func(path string) bool { return matches(path, pattern) }) {
				out = append(out, fmt.Sprintf("rule %q names %s, which does not exist", r.name, pattern))
			}
		}
		for _, p := range pkgs {
			if !matchesAny(p.ImportPath, r.from) || matchesAny(p.ImportPath, r.except) {
				continue
			}
			imports := p.Deps
			if r.direct {
				imports = p.Imports
			}
			for _, path := range imports {
				if matchesAny(path, r.to) {
					out = append(out, fmt.Sprintf("%s imports %s (rule %q: %s)", p.ImportPath, path, r.name, r.why))
				}
			}
		}
	}
	return out
}

func TestLayers(t *testing.T) {
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,Deps", "./...")
	cmd.Dir = "../.."
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	var pkgs []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
	for _, v := range violations(pkgs, rules) {
		t.Error(v)
	}
}

func TestViolations(t *testing.T) {
	own := func(path string, imports ...string) pkg {
		return pkg{ImportPath: module + "/" + path, Imports: imports, Deps: imports}
	}
	exact := []rule{{name: "r", from: []string{"./a/..."}, except: []string{"./a/ok"}, to: []string{"./b", "ext/..."}, direct: true}}
	rest := []pkg{own("a/ok", "ext/x", module+"/b"), own("b"), own("ab", "ext")}
	for _, tt := range []struct {
		name  string
		pkgs  []pkg
		rules []rule
		want  int
	}{
		{"clean", rest, exact, 0},
		{"own package", append(rest, own("a", module+"/b")), exact, 1},
		{"below", append(rest, own("a/c", module+"/b")), exact, 1},
		{"another package's beginning", append(rest, own("a", module+"/bb", "extra")), exact, 0},
		{"module outside, both", append(rest, own("a", "ext", "ext/y")), exact, 2},
		{"indirect", append(rest, pkg{ImportPath: module + "/a", Deps: []string{"ext"}}), exact, 0},
		{"indirect, forbidden", append(rest, pkg{ImportPath: module + "/a", Deps: []string{"ext"}}),
			[]rule{{name: "r", from: []string{"./a"}, to: []string{"ext"}}}, 1},
		{"name of nothing", rest, []rule{{name: "r", from: []string{"./gone"}, to: []string{"./b", "also/gone"}}}, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := violations(slices.Clone(tt.pkgs), tt.rules); len(got) != tt.want {
				t.Errorf("%d violations, want %d: %q", len(got), tt.want, got)
			}
		})
	}
}
