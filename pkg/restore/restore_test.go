package restore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
)

const samples = "../checkpoint/criu/testdata/"

// newRequest is a request that fits the sample checkpoint.
func newRequest(t *testing.T) *Request {
	t.Helper()
	b, err := os.ReadFile(samples + "criu42-spec.json")
	if err != nil {
		t.Fatal(err)
	}
	spec := new(specs.Spec)
	if err := json.Unmarshal(b, spec); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.CopyFS(filepath.Join(dir, checkpoint.ImageDir), os.DirFS(samples+"criu42")); err != nil {
		t.Fatal(err)
	}
	identity := checkpoint.Identity{Namespace: "default", Key: "web", Container: "app"}
	host := checkpoint.Host{Arch: "amd64", CRIUVersion: "4.2.1", CPUFlags: []string{"sse2"}}
	settings := checkpoint.Settings{Policy: checkpoint.PolicyResume, TCP: checkpoint.TCPClose}
	return &Request{
		Dir: dir,
		Manifest: &checkpoint.Manifest{
			ID: checkpoint.NewID(identity, time.Now()), Identity: identity, ImageDigest: "sha256:1", Settings: settings,
			Fingerprint: checkpoint.ComputeFingerprint(spec), Host: host, UptimeMillis: 60_000,
			Files: []checkpoint.File{{Path: checkpoint.RootfsDiffFile}, {Path: "volumes/0.layer"}},
		},
		Verify:   func(context.Context) error { return nil },
		Identity: identity, ImageDigest: "sha256:1", Spec: spec, Settings: settings, Hostname: "newpod", Host: host,
		ImageDir: filepath.Join(t.TempDir(), "images"),
	}
}

func TestPrepare(t *testing.T) {
	r := newRequest(t)
	r.Manifest.Volumes = []checkpoint.Volume{{Destination: "/dev/shm", File: "volumes/0.layer"}}
	p, err := Prepare(context.Background(), *r)
	if err != nil {
		t.Fatal(err)
	}
	if p.ImageDir != r.ImageDir || p.RootfsDiff != filepath.Join(r.Dir, checkpoint.RootfsDiffFile) {
		t.Errorf("plan %+v", p)
	}
	if len(p.Volumes) != 1 || p.Volumes[0].Mount.Type != "tmpfs" || p.Volumes[0].File != filepath.Join(r.Dir, "volumes/0.layer") {
		t.Errorf("volumes %+v", p.Volumes)
	}
	if !p.CRIU.TCPClose || p.CRIU.TCPEstablished || p.CRIU.LazyPages {
		t.Errorf("options %+v", p.CRIU)
	}
	// The plan's images have the new name, the checkpoint's keep theirs.
	for dir, want := range map[string]string{p.ImageDir: "newpod", filepath.Join(r.Dir, checkpoint.ImageDir): "oldpod"} {
		b, err := os.ReadFile(filepath.Join(dir, "utsns-12.img"))
		if err != nil || !strings.Contains(string(b), want) {
			t.Errorf("%s: %q, %v, want %s", dir, b, err, want)
		}
	}
}

// TestPrepareTCP restores connections only where they were dumped and wanted.
func TestPrepareTCP(t *testing.T) {
	r := newRequest(t)
	r.Settings.TCP = checkpoint.TCPKeep // the sample was dumped without
	p, err := Prepare(context.Background(), *r)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(p.CRIU, criu.RestoreOptions(checkpoint.TCPClose, false)) {
		t.Errorf("options %+v", p.CRIU)
	}
}

// TestPrepareTemplate: whoever of the namespace asks for the template gets it,
// where image and spec are the same but for the services that there are.
func TestPrepareTemplate(t *testing.T) {
	service := []string{"DB_SERVICE_HOST=10.0.0.1", "DB_SERVICE_PORT=5432"}
	for name, tc := range map[string]struct {
		change func(*Request)
		text   string // of the mismatch
	}{
		"another pod":       {func(r *Request) { r.Identity.Key = "other" }, ""},
		"another container": {func(r *Request) { r.Identity.Container = "other" }, ""},
		"services":          {func(r *Request) { r.Spec.Process.Env = append(r.Spec.Process.Env, service...) }, ""},
		"namespace":         {func(r *Request) { r.Identity.Namespace = "other" }, `template "shop" of namespace "default", the container asks for "shop" in "other"`},
		"template":          {func(r *Request) { r.Settings.Template = "bank" }, `asks for "bank"`},
		"not asked for":     {func(r *Request) { r.Settings.Template = "" }, `asks for ""`},
		"no template":       {func(r *Request) { r.Manifest.Template, r.Identity.Key = "", "other" }, "identity"},
		"digest":            {func(r *Request) { r.ImageDigest = "sha256:2" }, "image digest"},
		"spec":              {func(r *Request) { r.Spec.Process.Env = append(r.Spec.Process.Env, "A=1") }, "differs in env"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRequest(t)
			r.Manifest.Template, r.Settings.Template, r.Settings.Policy = "shop", "shop", checkpoint.PolicyTemplate
			tc.change(r)
			_, err := Prepare(context.Background(), *r)
			var refusal *Refusal
			if tc.text == "" && err != nil || tc.text != "" && (!errors.As(err, &refusal) || refusal.Code != Mismatch || !strings.Contains(err.Error(), tc.text)) {
				t.Errorf("error %v, want %q", err, tc.text)
			}
		})
	}
}

// TestPrepareMerge: a clone offers its memory for merging where its pod wants it
// and the kernel can; nothing else does so that did not before.
func TestPrepareMerge(t *testing.T) {
	for name, tc := range map[string]struct {
		template, merge, can bool
		changed              bool // of the images
	}{
		"wanted":          {true, true, true, true},
		"no KSM":          {true, true, false, false},
		"not wanted":      {true, false, true, false},
		"no template":     {false, true, true, false},
		"nothing of that": {false, false, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRequest(t)
			r.CanMerge = tc.can
			if tc.template {
				r.Manifest.Template, r.Settings.Template, r.Settings.Policy = "shop", "shop", checkpoint.PolicyTemplate
				r.Manifest.Fingerprint = checkpoint.ComputeFingerprint(r.Spec)
			}
			r.Settings.Merge = tc.merge
			p, err := Prepare(context.Background(), *r)
			if err != nil {
				t.Fatal(err)
			}
			names, err := filepath.Glob(filepath.Join(p.ImageDir, "mm-*.img"))
			if err != nil || len(names) == 0 {
				t.Fatalf("%v, %v", names, err)
			}
			for _, name := range names {
				if _, err := os.Readlink(name); (err != nil) != tc.changed {
					t.Errorf("%s: changed: %v, want %v", name, err != nil, tc.changed)
				}
			}
		})
	}
}

func TestPrepareRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*Request)
		code   string
		text   string
	}{
		"identity":    {func(r *Request) { r.Identity.Namespace = "other" }, Mismatch, "identity: the checkpoint is of default/web/app, the container is other/web/app"},
		"digest":      {func(r *Request) { r.ImageDigest = "sha256:2" }, Mismatch, "image digest"},
		"no digest":   {func(r *Request) { r.ImageDigest, r.Manifest.ImageDigest = "", "" }, Mismatch, "image digest"},
		"spec":        {func(r *Request) { r.Spec.Process.Args = []string{"/other"}; r.Spec.Process.Env = nil }, Mismatch, "spec: differs in args, env"},
		"fingerprint": {func(r *Request) { r.Fingerprint = checkpoint.Fingerprint{"args": "1"} }, Mismatch, "spec: differs in"},
		"none":        {func(r *Request) { r.Manifest.Fingerprint = nil }, Mismatch, "fingerprint"},
		"policy":      {func(r *Request) { r.Settings.Policy = checkpoint.PolicyOff }, Invalid, "policy"},
		"incomplete":  {func(r *Request) { r.Manifest = nil }, Invalid, "incomplete"},
		"host":        {func(r *Request) { r.Host.CPUFlags = nil }, Incompatible, "host: cpuFlags: this CPU lacks sse2"},
		"crash loop":  {func(r *Request) { r.Manifest.RestoredFrom, r.MinUptime = "x", time.Hour }, CrashLooping, "60000 ms"},
		"volume":      {func(r *Request) { r.Manifest.Volumes = []checkpoint.Volume{{Destination: "/cache"}} }, Mismatch, "/cache"},
		"damage": {func(r *Request) {
			r.Verify = func(context.Context) error { return fmt.Errorf("x.img: %w", checkpoint.ErrCorrupt) }
		}, Corrupt, "x.img"},
		"damage that shows": {func(r *Request) {
			os.WriteFile(r.Dir+"/checkpoint/pstree.img", nil, 0o600)
			r.Verify = func(context.Context) error { return fmt.Errorf("pstree.img has 0 bytes: %w", checkpoint.ErrCorrupt) }
		}, Corrupt, "verify: pstree.img has 0 bytes"},
		"unreadable":   {func(r *Request) { r.Verify = func(context.Context) error { return os.ErrPermission } }, Internal, "verify"},
		"gone":         {func(r *Request) { os.RemoveAll(r.Dir) }, Missing, "open image directory"},
		"empty images": {func(r *Request) { os.WriteFile(r.Dir+"/checkpoint/pstree.img", nil, 0o600) }, Corrupt, "pstree.img"},
		"rights": {func(r *Request) {
			r.Spec.Process.Capabilities.Bounding = nil
			r.Fingerprint = r.Manifest.Fingerprint // as if it had matched
		}, Incompatible, "bounding capabilities"},
		"host name": {func(r *Request) { r.Hostname = "a b" }, Invalid, "host name"},
		"occupied":  {func(r *Request) { os.MkdirAll(r.ImageDir, 0o700) }, Internal, "link images"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRequest(t)
			tc.change(r)
			p, err := Prepare(context.Background(), *r)
			var refusal *Refusal
			if p != nil || !errors.As(err, &refusal) || refusal.Code != tc.code || !strings.Contains(err.Error(), tc.text) {
				t.Errorf("plan %v, error %v, want code %s, text %q", p, err, tc.code, tc.text)
			}
		})
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := newRequest(t)
	r.Verify = func(ctx context.Context) error { cancel(); return ctx.Err() }
	var refusal *Refusal
	if _, err := Prepare(ctx, *r); !errors.As(err, &refusal) || refusal.Code != Aborted {
		t.Errorf("cancelled: %v", err)
	}
}

// TestPrepareOrder reads the whole checkpoint only after all cheap checks.
func TestPrepareOrder(t *testing.T) {
	r := newRequest(t)
	r.Host.Arch = "arm64"
	r.Verify = func(context.Context) error { t.Error("verified in vain"); return nil }
	if _, err := Prepare(context.Background(), *r); err == nil {
		t.Error("accepted")
	}
}

func TestCrashLoop(t *testing.T) {
	for _, tc := range []struct {
		from   checkpoint.ID
		uptime int64
		min    time.Duration
		want   bool
	}{
		{"", 1, 10 * time.Second, false},
		{"x", 9_999, 10 * time.Second, true},
		{"x", 10_000, 10 * time.Second, false},
		{"x", -5, 10 * time.Second, true},
		{"x", 1, 0, false},
	} {
		m := &checkpoint.Manifest{RestoredFrom: tc.from, UptimeMillis: tc.uptime}
		if got := CrashLoop(m, tc.min); got != tc.want {
			t.Errorf("%+v: %v", tc, got)
		}
	}
}
