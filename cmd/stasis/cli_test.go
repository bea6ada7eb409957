package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
	"github.com/stasis-containers/stasis/pkg/checkpoint/layer"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"

	"github.com/stasis-containers/stasis/nri/eventlog"
)

const testImages = "../../pkg/checkpoint/criu/testdata"

// testStore is a real store, and the command that is run on it.
type testStore struct {
	*store.Store
	t *testing.T
}

func newStore(t *testing.T) *testStore {
	t.Helper()
	st, err := store.Open(fsys.OS{}, filepath.Join(t.TempDir(), "store"))
	if err != nil {
		t.Fatal(err)
	}
	return &testStore{st, t}
}

// run runs the command and returns what it prints and its exit code.
func (s *testStore) run(args ...string) (stdout, stderr string, code int) {
	s.t.Helper()
	var out, err bytes.Buffer
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	code = run(ctx, append([]string{"--root", s.Root()}, args...), terminal{strings.NewReader(""), &out, &err})
	return out.String(), err.String(), code
}

// must runs the command, which must succeed.
func (s *testStore) must(args ...string) string {
	s.t.Helper()
	out, err, code := s.run(args...)
	if code != 0 {
		s.t.Fatalf("stasis %s: exit code %d\n%s%s", strings.Join(args, " "), code, out, err)
	}
	return out
}

func (s *testStore) fails(want int, part string, args ...string) {
	s.t.Helper()
	out, err, code := s.run(args...)
	if code != want || !strings.Contains(out+err, part) {
		s.t.Errorf("stasis %s: exit code %d, want %d and %q\n%s%s", strings.Join(args, " "), code, want, part, out, err)
	}
}

// add commits a checkpoint made of CRIU's images of the tests.
func (s *testStore) add(key string, at time.Time, fill func(dir string, m *checkpoint.Manifest)) checkpoint.ID {
	s.t.Helper()
	identity := checkpoint.Identity{Namespace: "default", Key: key, Container: "c"}
	m := &checkpoint.Manifest{
		FormatVersion: checkpoint.FormatVersion, ID: checkpoint.NewID(identity, at), Identity: identity, CreatedAt: at, Generation: 1,
		PodName: "pod\x1b[31m", PodUID: "uid", ContainerID: "4f5a0e9d2c1b", ImageName: "busybox:1", ImageDigest: "sha256:aa", UptimeMillis: 5000,
		Settings: checkpoint.Settings{Policy: checkpoint.PolicyResume, Key: key, OnFailure: checkpoint.OnFailureColdStart, TCP: checkpoint.TCPKeep},
		Host:     checkpoint.Host{Arch: "amd64", KernelRelease: "6.18", CRIUVersion: "4.2.1", CPUFlags: []string{"fpu"}, CgroupMode: "unified"},
		Lost:     []string{"exec process 7"},
	}
	stage, err := s.Stage(context.Background(), m.ID)
	if err != nil {
		s.t.Fatal(err)
	}
	copyDir(s.t, filepath.Join(testImages, "criu42"), filepath.Join(stage.Dir(), checkpoint.ImageDir))
	if err := os.Rename(filepath.Join(stage.Dir(), checkpoint.ImageDir, statsFile), filepath.Join(stage.Dir(), statsFile)); err != nil {
		s.t.Fatal(err)
	}
	copyFile(s.t, filepath.Join(testImages, "criu42-spec.json"), filepath.Join(stage.Dir(), checkpoint.SpecFile))
	if fill != nil {
		fill(stage.Dir(), m)
	}
	if err := stage.Commit(context.Background(), m); err != nil {
		s.t.Fatal(err)
	}
	return m.ID
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func copyDir(t *testing.T, from, to string) {
	t.Helper()
	entries, err := os.ReadDir(from)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		copyFile(t, filepath.Join(from, e.Name()), filepath.Join(to, e.Name()))
	}
}

func capture(t *testing.T, dir, file string) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := layer.Capture(context.Background(), f, dir); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func (s *testStore) ids() (ids []string) {
	s.t.Helper()
	var list []recordJSON
	if err := json.Unmarshal([]byte(s.must("ls", "-o", "json")), &list); err != nil {
		s.t.Fatal(err)
	}
	for _, r := range list {
		ids = append(ids, string(r.ID))
	}
	return ids
}

func (s *testStore) events() (types []string) {
	s.t.Helper()
	if err := eventlog.Read(s.Root(), func(e event.Event) { types = append(types, string(e.Type)+" "+e.Reason) }); err != nil {
		s.t.Fatal(err)
	}
	return types
}

func TestList(t *testing.T) {
	s := newStore(t)
	if out := s.must("ls", "-o", "json"); strings.TrimSpace(out) != "[]" {
		t.Errorf("an empty store: %s", out)
	}
	a := s.add("a", time.Now().Add(-time.Hour), nil)
	b := s.add("b", time.Now(), nil)
	if err := s.Quarantine(context.Background(), b, "CRIU failed", nil); err != nil {
		t.Fatal(err)
	}
	out := s.must("ls")
	for _, want := range []string{string(a), string(b), "default/a/c", "committed", "quarantined", "CRIU failed", "60m", "KiB"} {
		if !strings.Contains(out, want) && !(want == "60m" && strings.Contains(out, "1h")) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if strings.ContainsRune(out, '\x1b') {
		t.Error("an escape character of a pod's name reaches the terminal")
	}
	if out := s.must("ls", "--state", "quarantined"); strings.Contains(out, string(a)) || !strings.Contains(out, string(b)) {
		t.Errorf("only the quarantined one:\n%s", out)
	}
	if out := s.must("ls", "-n", "other"); strings.Contains(out, string(a)) {
		t.Errorf("of another namespace:\n%s", out)
	}
	s.fails(exitUsage, "--state", "ls", "--state", "asleep")
	s.fails(exitUsage, "--output", "ls", "-o", "yaml")
	s.fails(exitUsage, "unknown flag", "ls", "--nope")
	s.fails(exitUsage, "unknown command", "nope")
	s.fails(exitNotFound, "no store", "ls", "--root", filepath.Join(s.Root(), "nope"))
}

func TestInspect(t *testing.T) {
	s := newStore(t)
	id := string(s.add("a", time.Now(), nil))
	out := s.must("inspect", id)
	for _, want := range []string{id, "default/a/c", "busybox:1 sha256:aa", "TCP keep", "exec process 7", "Processes", "Mappings", "Open files", "Sockets", "/app", "zombie"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	out = s.must("inspect", id[:20], "--sockets")
	if strings.Contains(out, "Processes") || !strings.Contains(out, "Sockets") {
		t.Errorf("only the sockets:\n%s", out)
	}
	var j struct {
		ID       string               `json:"id"`
		State    string               `json:"state"`
		Manifest *checkpoint.Manifest `json:"manifest"`
		Images   struct {
			Processes []struct {
				Comm     string `json:"comm"`
				Mappings []any  `json:"mappings"`
			} `json:"processes"`
		} `json:"images"`
	}
	if err := json.Unmarshal([]byte(s.must("inspect", id, "-o", "json", "--processes")), &j); err != nil {
		t.Fatal(err)
	}
	if j.ID != id || j.State != "committed" || j.Manifest == nil || len(j.Images.Processes) < 2 || j.Images.Processes[0].Comm != "app" || j.Images.Processes[0].Mappings != nil {
		t.Errorf("%+v", j)
	}
	s.fails(exitNotFound, "no such checkpoint", "inspect", "ffffffffffffffff")
	s.fails(exitUsage, "accepts 1 arg", "inspect")

	broken := filepath.Join(s.Root(), "checkpoints", id[:16], id, checkpoint.ImageDir, "pstree.img")
	if err := os.WriteFile(broken, []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.fails(exitFailure, "default/a/c", "inspect", id) // still tells what it knows
	s.fails(exitFailure, "imagesError", "inspect", id, "-o", "json")
}

func TestVerify(t *testing.T) {
	s := newStore(t)
	a, b := string(s.add("a", time.Now(), nil)), string(s.add("b", time.Now(), nil))
	s.must("verify", "--all")
	page := filepath.Join(s.Root(), "checkpoints", b[:16], b, checkpoint.ImageDir, "pages-1.img")
	bytes, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	bytes[17] ^= 1
	if err := os.WriteFile(page, bytes, 0o600); err != nil {
		t.Fatal(err)
	}
	s.must("verify", a)
	s.fails(exitFailure, "pages-1.img", "verify", "--all")
	s.fails(exitFailure, `"ok": false`, "verify", b, "-o", "json")
	s.fails(exitUsage, "--all", "verify")
	s.fails(exitUsage, "--all", "verify", "--all", a)
	s.fails(exitNotFound, "no such", "verify", "0000")
	if len(s.ids()) != 2 {
		t.Error("verify changed the store")
	}
	s.fails(exitFailure, "checksum", "export", b, filepath.Join(t.TempDir(), "x.tar"))
}

func TestRemove(t *testing.T) {
	s := newStore(t)
	a, b := string(s.add("a", time.Now(), nil)), s.add("b", time.Now(), nil)
	claim, err := s.Claim(context.Background(), b, "container")
	if err != nil {
		t.Fatal(err)
	}
	if out := s.must("rm", "--dry-run", a); !strings.Contains(out, "would remove "+a) || len(s.ids()) != 2 {
		t.Errorf("dry run:\n%s", out)
	}
	s.fails(exitFailure, "being restored", "rm", a, string(b))
	if len(s.ids()) != 2 {
		t.Error("one was removed, though the other is claimed")
	}
	s.must("rm", a)
	if got := s.ids(); len(got) != 1 || got[0] != string(b) {
		t.Errorf("left: %v", got)
	}
	if got := s.events(); len(got) != 1 || got[0] != "removed stasis rm: asked for" {
		t.Errorf("events %q", got)
	}
	s.fails(exitNotFound, "no such", "rm", a)
	s.fails(exitUsage, "requires at least 1 arg", "rm")
	if err := claim.Release(context.Background()); err != nil {
		t.Fatal(err)
	}
	s.add("b", time.Now().Add(time.Second), nil)
	s.fails(exitUsage, "2 checkpoints", "rm", string(b[:16]))
}

func TestGC(t *testing.T) {
	s := newStore(t)
	old := string(s.add("a", time.Now().Add(-100*time.Hour), nil))
	fresh := string(s.add("a", time.Now(), nil))
	out := s.must("gc", "--dry-run", "-o", "json")
	if !strings.Contains(out, old) || strings.Contains(out, fresh) || len(s.ids()) != 2 {
		t.Errorf("dry run:\n%s", out)
	}
	s.must("gc", "--dry-run", "--ttl", "0")
	if out := s.must("gc"); !strings.Contains(out, old) || !strings.Contains(out, "removed 1 checkpoints") {
		t.Errorf("gc:\n%s", out)
	}
	if got := s.ids(); len(got) != 1 || got[0] != fresh {
		t.Errorf("left: %v", got)
	}
	if got := s.events(); len(got) != 1 || !strings.HasPrefix(got[0], "removed stasis gc: older") {
		t.Errorf("events %q", got)
	}
	s.fails(exitUsage, "negative", "gc", "--max-count", "-1")
	s.must("gc", "--max-bytes", "1")
	if got := s.ids(); len(got) != 0 {
		t.Errorf("left: %v", got)
	}
}

func TestEvents(t *testing.T) {
	s := newStore(t)
	identity := &checkpoint.Identity{Namespace: "default", Key: "db-0", Container: "postgres"}
	for _, e := range []event.Event{
		{Time: time.Now().Add(-2 * time.Hour), Type: event.Dumped, Identity: identity, ContainerID: "aaaaaaaaaaaa", SizeBytes: 1 << 20, DurationMicros: 250000},
		{Type: event.ColdStart, Identity: identity, ContainerID: "bbbbbbbbbbbb", ReasonCode: "mismatch", Reason: "image\x1b]0;"},
		{Type: event.Restored, ContainerID: "cccccccccccc"},
	} {
		if err := event.Append(s.Root(), e); err != nil {
			t.Fatal(err)
		}
	}
	for args, want := range map[string][]string{
		"":                                  {"dumped", "cold-start", "restored"},
		"--since 1h":                        {"cold-start", "restored"},
		"--since 2020-01-01":                {"dumped", "cold-start", "restored"},
		"--type dumped":                     {"dumped"},
		"--type dumped,restored":            {"dumped", "restored"},
		"--container default/db-0/postgres": {"dumped", "cold-start"},
		"--container postgres":              {"dumped", "cold-start"},
		"--container bbbbbbbb":              {"cold-start"},
		"--container nobody":                nil,
	} {
		out := s.must(append([]string{"events", "-o", "json"}, strings.Fields(args)...)...)
		var got []string
		for d := json.NewDecoder(strings.NewReader(out)); ; {
			var e event.Event
			if err := d.Decode(&e); err == io.EOF {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			got = append(got, string(e.Type))
		}
		if strings.Join(got, " ") != strings.Join(want, " ") {
			t.Errorf("events %s: %q, want %q", args, got, want)
		}
	}
	out := s.must("events")
	for _, want := range []string{"2h", "default/db-0/postgres", "1.0 MiB", "250ms", "mismatch: image"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if strings.ContainsRune(out, '\x1b') {
		t.Error("an escape character reaches the terminal")
	}
	s.fails(exitUsage, "--type", "events", "--type", "born")
	s.fails(exitUsage, "--since", "events", "--since", "yesterday")
}

// TestFollowEvents sees events of the past, then those that come, across a rotation.
func TestFollowEvents(t *testing.T) {
	s := newStore(t)
	put := func(reason string) {
		if err := event.Append(s.Root(), event.Event{Type: event.Dumped, Reason: reason}); err != nil {
			t.Fatal(err)
		}
	}
	put("first")
	ctx, cancel := context.WithCancel(context.Background())
	r, w := io.Pipe()
	done := make(chan int, 1)
	go func() {
		done <- run(ctx, []string{"--root", s.Root(), "events", "--follow", "--since", "1h"}, terminal{strings.NewReader(""), w, io.Discard})
		w.Close()
	}()
	lines := make(chan string)
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := r.Read(buf)
			if err != nil {
				close(lines)
				return
			}
			lines <- string(buf[:n])
		}
	}()
	want := func(reason string) {
		t.Helper()
		select {
		case l := <-lines:
			if !strings.Contains(l, reason) {
				t.Errorf("line %q, want %q", l, reason)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("no %q", reason)
		}
	}
	want("first")
	put("second")
	want("second")
	if did, err := eventlog.Rotate(s.Root(), 1); !did || err != nil {
		t.Fatal(did, err)
	}
	put("third")
	want("third")
	cancel()
	if code := <-done; code != 0 {
		t.Errorf("exit code %d", code)
	}
}

func TestVersionAndHelp(t *testing.T) {
	s := newStore(t)
	if out := s.must("version", "-o", "json"); !strings.Contains(out, `"formatVersion": 1`) {
		t.Error(out)
	}
	help := s.must("--help")
	for _, name := range []string{"ls", "inspect", "rm", "gc", "verify", "events", "doctor", "export", "import", "status", "prepare-reboot", "version", "completion"} {
		if !strings.Contains(help, "\n  "+name+" ") {
			t.Errorf("no %s in\n%s", name, help)
		}
		s.must(name, "--help")
	}
	if out := s.must("completion", "bash"); !strings.Contains(out, "bash completion") {
		t.Error("no completion")
	}
	id := string(s.add("a", time.Now(), nil))
	if out := s.must("__complete", "inspect", ""); !strings.Contains(out, id) {
		t.Errorf("completion of an ID:\n%s", out)
	}
	s.fails(exitFailure, "is it running", "status", "--runtime-dir", t.TempDir())
}
