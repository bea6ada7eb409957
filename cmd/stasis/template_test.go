package main

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.yaml.in/yaml/v3"

	"github.com/stasis-containers/stasis/internal/testenv"
	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/control"
	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

// addTemplate commits a version of a template.
func (s *testStore) addTemplate(key, name string, at time.Time) checkpoint.ID {
	return s.add(key, at, func(_ string, m *checkpoint.Manifest) { m.Template = name })
}

// Snapshot makes a version as a shim does.
func (s *rebootShim) Snapshot(_ context.Context, _, template string) (control.Result, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return control.Result{}, s.err
	}
	id := s.n.addTemplate(s.key, template, time.Now())
	return control.Result{CheckpointID: id, SizeBytes: 3 << 20, Duration: 1500 * time.Millisecond, Timings: checkpoint.Timings{CRIUMicros: 80_000, CopyMicros: 20_000}}, nil
}

func (n *rebootNode) create(more ...string) []string {
	return append([]string{"template", "create", "--containerd-state", n.state}, more...)
}

func TestTemplateCreate(t *testing.T) {
	n := newRebootNode(t)
	a := n.serve("a")
	a.status.Identity = checkpoint.Identity{Namespace: "default", Key: "a", Container: "c"}
	// Its pod's name is hostile, as the author of the pod chose it.
	pod := "default/pod-a\x1b[31m"
	out := n.must(n.create("shop", "--pod", pod)...)
	if !strings.Contains(out, "default/shop@") || !strings.Contains(out, "3.0 MiB in 1.5s") || !strings.Contains(out, "100ms") {
		t.Errorf("%q", out)
	}
	var got struct {
		store.TemplateRef
		SizeBytes int64
	}
	if err := json.Unmarshal([]byte(n.must(n.create("shop", "--pod", pod, "--container", "c", "-o", "json")...)), &got); err != nil {
		t.Fatal(err)
	}
	if got.Namespace != "default" || got.Name != "shop" || got.SizeBytes != 3<<20 {
		t.Errorf("%+v", got)
	}
	n.fails(exitNotFound, "opted in", n.create("shop", "--pod", "default/other")...)
	n.fails(exitNotFound, "container d", n.create("shop", "--pod", pod, "--container", "d", "--wait", "50ms")...)
	n.fails(exitNotFound, "opted in", n.create("shop", "--pod", "other/pod-a\x1b[31m")...)
	n.fails(exitUsage, "name", n.create("../x", "--pod", pod)...)
	n.fails(exitUsage, "NAMESPACE/POD", n.create("shop", "--pod", "pod")...)
	n.fails(exitUsage, "--timeout", n.create("shop", "--pod", pod, "--timeout", "0s")...)
	a.mu.Lock()
	a.err = errdefs.ErrUnavailable
	a.mu.Unlock()
	n.fails(exitFailure, "unavailable", n.create("shop", "--pod", pod)...)
	a.mu.Lock()
	a.err, a.status.State = nil, control.Stopped
	a.mu.Unlock()
	n.fails(exitNotFound, "opted in", n.create("shop", "--pod", pod)...)

	// A container that comes later is waited for.
	go func() {
		time.Sleep(300 * time.Millisecond)
		a.mu.Lock()
		defer a.mu.Unlock()
		a.status.State = control.Running
	}()
	n.must(n.create("shop", "--pod", pod, "--wait", "20s")...)
}

func TestTemplates(t *testing.T) {
	s := newStore(t)
	if out := s.must("template", "ls", "-o", "json"); strings.TrimSpace(out) != "[]" {
		t.Errorf("an empty store: %s", out)
	}
	v1 := string(s.addTemplate("a", "shop", time.Now().Add(-time.Hour)))
	v2 := string(s.addTemplate("b", "shop", time.Now()))
	bank := string(s.addTemplate("a", "bank", time.Now()))
	record := string(s.add("a", time.Now(), nil))

	out := s.must("template", "ls")
	for _, want := range []string{"default/shop", "default/bank", v1, v2, bank, "superseded", "pod?[31m/c", "busybox:1", "KiB"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if strings.Contains(out, record) || strings.ContainsRune(out, '\x1b') || strings.Contains(s.must("ls"), v1) {
		t.Errorf("templates and checkpoints are mixed up:\n%s", out)
	}
	if out := s.must("template", "ls", "-n", "other"); strings.Contains(out, v1) {
		t.Errorf("of another namespace:\n%s", out)
	}
	var list []templateJSON
	if err := json.Unmarshal([]byte(s.must("template", "ls", "-o", "json")), &list); err != nil || len(list) != 3 || !list[0].Newest || list[1].Newest || list[1].Manifest == nil {
		t.Errorf("%+v, %v", list, err)
	}
	out = s.must("template", "inspect", "default/shop")
	for _, want := range []string{v2, "Template:", "Mappings", "not possible: it was made without images for that"} {
		if !strings.Contains(out, want) {
			t.Errorf("inspect: no %q in\n%s", want, out)
		}
	}
	if out := s.must("template", "inspect", "default/shop@"+v1[:20]); !strings.Contains(out, v1) {
		t.Errorf("inspect a version:\n%s", out)
	}
	if out := s.must("__complete", "template", "rm", ""); !strings.Contains(out, "default/bank") {
		t.Errorf("completion:\n%s", out)
	}
	for _, command := range []string{"inspect", "rm", "verify"} {
		for _, name := range []string{"shop", "default/../x", "/shop", "default/shop@", "default/shop/x"} {
			s.fails(exitUsage, "NAMESPACE/NAME", "template", command, name)
		}
		s.fails(exitNotFound, "no template", "template", command, "default/nope")
		s.fails(exitNotFound, "no template", "template", command, "default/shop@ffffffffffffffff")
	}
	s.fails(exitUsage, "--all", "template", "verify")

	if out := s.must("template", "verify", "--all"); strings.Count(out, "  ok") != 3 {
		t.Errorf("verify:\n%s", out)
	}
	images, err := filepath.Glob(filepath.Join(s.Root(), "templates/default/shop", v2, "checkpoint", "core-*.img"))
	if err != nil || len(images) == 0 {
		t.Fatalf("%v, %v", images, err)
	}
	b, err := os.ReadFile(images[0])
	if err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if err := os.WriteFile(images[0], b, 0o600); err != nil {
		t.Fatal(err)
	}
	s.fails(exitFailure, "checksum", "template", "verify", "default/shop")
	s.fails(exitFailure, `"ok": false`, "template", "verify", "--all", "-o", "json")

	pin, err := s.PinTemplate(t.Context(), store.TemplateRef{Namespace: "default", Name: "shop", Version: checkpoint.ID(v1)}, "some-container")
	if err != nil {
		t.Fatal(err)
	}
	if out := s.must("template", "ls"); !strings.Contains(out, "1 being created from it") {
		t.Errorf("ls:\n%s", out)
	}
	s.fails(exitFailure, "some-container", "template", "rm", "default/shop")
	if err := pin.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	if out := s.must("template", "rm", "--dry-run", "default/shop"); !strings.Contains(out, "would remove 2 ") {
		t.Errorf("dry run:\n%s", out)
	}
	if out := s.must("template", "rm", "default/shop"); !strings.Contains(out, "removed 2 ") {
		t.Errorf("rm:\n%s", out)
	}
	if out := s.must("template", "ls"); strings.Contains(out, v1) || strings.Contains(out, v2) || !strings.Contains(out, bank) {
		t.Errorf("after rm:\n%s", out)
	}
	if e := s.events(); len(e) != 2 || e[0] != "removed stasis template rm: template default/shop" {
		t.Errorf("events %q", e)
	}
}

// TestTemplateSample: the samples' annotations are ones that the daemon accepts,
// and the hook is what the program of the sample waits for.
func TestTemplateSample(t *testing.T) {
	for file, hook := range map[string]string{"sample-template.yaml": "", "sample-java.yaml": "http://127.0.0.1:8080/cloned"} {
		b, err := os.ReadFile(filepath.Join(contrib, "kubernetes", file))
		if err != nil {
			t.Fatal(err)
		}
		var d struct {
			Spec struct {
				Template struct {
					Metadata struct{ Annotations map[string]string }
					Spec     struct {
						RuntimeClassName string `yaml:"runtimeClassName"`
						Containers       []struct{ Name string }
					}
				}
			}
		}
		if err := yaml.Unmarshal(b, &d); err != nil {
			t.Fatal(err)
		}
		pod := d.Spec.Template
		for name := range pod.Metadata.Annotations {
			if !checkpoint.Known(name) {
				t.Errorf("%s: annotation %s", file, name)
			}
		}
		s, err := checkpoint.ParseSettings(pod.Metadata.Annotations, pod.Spec.Containers[0].Name)
		if err != nil || s.Policy != checkpoint.PolicyTemplate || s.Template == "" || pod.Spec.RuntimeClassName != "stasis" {
			t.Errorf("%s: %+v, %v", file, s, err)
		}
		if (s.AfterRestore != "") != (hook != "") {
			t.Errorf("%s: hook %q", file, s.AfterRestore)
		}
		if hook == "" {
			continue
		}
		if h, err := checkpoint.ParseHook(s.AfterRestore); err != nil || !slices.Contains(h.Args, hook) {
			t.Errorf("%s: hook %+v, %v", file, h, err)
		}
		source, err := os.ReadFile(filepath.Join(contrib, "samples/java-clone/Service.java"))
		if err != nil || !strings.Contains(string(source), s.AfterRestore) || !strings.Contains(string(source), `"/cloned"`) {
			t.Errorf("the program does not tell of the hook: %v", err)
		}
	}
}

// TestExportTemplate: what is laid out for the clones of a node gets into no archive.
func TestExportTemplate(t *testing.T) {
	testenv.Need(t, testenv.Root)
	s := newStore(t)
	id := s.add("a", time.Now(), func(dir string, m *checkpoint.Manifest) {
		m.Template = "shop"
		if err := criu.LayOutMapped(t.Context(), filepath.Join(dir, checkpoint.ImageDir), filepath.Join(dir, checkpoint.MappedDir)); err != nil {
			t.Fatal(err)
		}
	})
	var inspected struct{ Mapped mappedJSON }
	if err := json.Unmarshal([]byte(s.must("template", "inspect", "default/shop", "-o", "json")), &inspected); err != nil || !strings.Contains(inspected.Mapped.Reason, "no Java virtual machine") {
		t.Errorf("%+v, %v", inspected, err)
	}
	if err := s.QuarantineTemplate(t.Context(), store.TemplateRef{Namespace: "default", Name: "shop", Version: id}, "for the test", nil); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "shop.tar")
	s.must("export", string(id), file)
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got := members(t, f)
	for name := range got {
		if strings.HasPrefix(name, checkpoint.MappedDir) {
			t.Errorf("%s is in the archive", name)
		}
	}
	if b := got[checkpoint.ManifestFile]; len(b) == 0 || strings.Contains(string(b), checkpoint.MappedDir+"/") {
		t.Errorf("manifest %s", b)
	}
	s.must("import", file, "-n", "prod", "--key", "b", "--container", "c2")
}
