package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	metadata "github.com/checkpoint-restore/checkpointctl/lib"
	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/internal/testenv"
	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/layer"
)

// upperDir is an overlay's upper directory with one of everything.
func upperDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(os.MkdirAll(filepath.Join(dir, "etc/sub"), 0o755))
	check(os.WriteFile(filepath.Join(dir, "etc/file"), []byte("content"), 0o640))
	check(os.Chown(filepath.Join(dir, "etc/file"), 7, 8))
	check(os.Link(filepath.Join(dir, "etc/file"), filepath.Join(dir, "etc/hard")))
	check(os.Symlink("/etc/file", filepath.Join(dir, "etc/soft")))
	check(unix.Mknod(filepath.Join(dir, "etc/gone"), unix.S_IFCHR, 0)) // whiteout
	check(unix.Setxattr(filepath.Join(dir, "etc/sub"), "trusted.overlay.opaque", []byte("y"), 0))
	check(unix.Setxattr(filepath.Join(dir, "etc/file"), "user.note", []byte("x"), 0))
	check(os.WriteFile(filepath.Join(dir, "etc/sub/new"), nil, 0o600))
	return dir
}

// members lists an archive's members and their contents.
func members(t *testing.T, r io.Reader) map[string][]byte {
	t.Helper()
	m := map[string][]byte{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return m
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg && h.Mode != 0o600 && !strings.HasPrefix(h.Name, "etc") && !strings.Contains(h.Name, ".wh.") {
			t.Errorf("%s has mode %o", h.Name, h.Mode)
		}
		m[h.Name] = b
	}
}

// addWhole commits a checkpoint with a writable layer and a volume.
func (s *testStore) addWhole(t *testing.T, key string) string {
	upper, volume := upperDir(t), t.TempDir()
	if err := os.WriteFile(filepath.Join(volume, "f"), []byte("vol"), 0o600); err != nil {
		t.Fatal(err)
	}
	return string(s.add(key, time.Now(), func(dir string, m *checkpoint.Manifest) {
		capture(t, upper, filepath.Join(dir, checkpoint.RootfsDiffFile))
		if err := os.Mkdir(filepath.Join(dir, checkpoint.VolumeDir), 0o700); err != nil {
			t.Fatal(err)
		}
		capture(t, volume, filepath.Join(dir, checkpoint.VolumeDir, "0.layer"))
		m.Volumes = []checkpoint.Volume{{Destination: "/dev/shm", File: "volumes/0.layer"}}
	}))
}

// TestArchive exports a checkpoint and imports it under another key: nothing of
// it may change on the way.
func TestArchive(t *testing.T) {
	testenv.Need(t, testenv.Root)
	s := newStore(t)
	id := s.addWhole(t, "a")
	file := filepath.Join(t.TempDir(), "a.tar")
	s.must("export", id, file)
	st, err := os.Stat(file)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("archive: %v, %v", st, err)
	}
	s.fails(exitFailure, "--force", "export", id, file)
	s.must("export", "--force", id, file)
	if left, err := filepath.Glob(filepath.Join(filepath.Dir(file), ".*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	s.must("verify", id) // and nothing was left in the checkpoint

	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	got := members(t, bytes.NewReader(b))
	var config metadata.ContainerConfig
	if err := json.Unmarshal(got[metadata.ConfigDumpFile], &config); err != nil || config.ID != "4f5a0e9d2c1b" || config.RootfsImageName != "busybox:1" || config.CheckpointedAt.Sub(config.CreatedTime) != 5*time.Second {
		t.Errorf("config %+v, error %v", config, err)
	}
	if want := `["/etc/gone"]`; strings.Join(strings.Fields(string(got[metadata.DeletedFilesFile])), "") != want {
		t.Errorf("deleted files %s, want %s", got[metadata.DeletedFilesFile], want)
	}
	for _, name := range []string{"spec.dump", "stats-dump", "checkpoint/", "checkpoint/inventory.img", "checkpoint/pages-1.img", "manifest.json", "volumes/0.layer"} {
		if _, ok := got[name]; !ok {
			t.Errorf("no %s in the archive", name)
		}
	}
	diff := members(t, bytes.NewReader(got[metadata.RootFsDiffTar]))
	for _, name := range []string{"etc/file", "etc/.wh.gone", "etc/sub/.wh..wh..opq"} {
		if _, ok := diff[name]; !ok {
			t.Errorf("no %s in the layer", name)
		}
	}

	var m checkpoint.Manifest
	if err := json.Unmarshal([]byte(s.must("import", file, "-n", "prod", "--key", "b", "--container", "c2", "-o", "json")), &m); err != nil {
		t.Fatal(err)
	}
	old, err := s.Manifest(context.Background(), checkpoint.ID(id))
	if err != nil {
		t.Fatal(err)
	}
	if m.Identity != (checkpoint.Identity{Namespace: "prod", Key: "b", Container: "c2"}) || m.ImageDigest != old.ImageDigest || m.Host.CRIUVersion != "4.2.1" ||
		m.Settings.TCP != checkpoint.TCPKeep || m.Settings.Key != "b" || len(m.Volumes) != 1 || m.PodUID != "" {
		t.Errorf("imported %+v", m)
	}
	s.must("verify", string(m.ID))
	sums := func(m *checkpoint.Manifest) (sums []string) {
		for _, f := range m.Files {
			if f.Path != checkpoint.RootfsDiffFile { // times of access may differ
				sums = append(sums, f.Path+" "+f.CRC32C)
			}
		}
		slices.Sort(sums)
		return sums
	}
	if a, b := sums(old), sums(&m); !slices.Equal(a, b) {
		t.Errorf("files\n%q\nbecame\n%q", a, b)
	}
	// The layer makes the same tree.
	dir := t.TempDir()
	f, err := os.Open(filepath.Join(s.Root(), "checkpoints", string(m.ID[:16]), string(m.ID), checkpoint.RootfsDiffFile))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := layer.Apply(context.Background(), f, dir, layer.Options{}); err != nil {
		t.Fatal(err)
	}
	lstat := func(name string) (st unix.Stat_t) {
		t.Helper()
		if err := unix.Lstat(filepath.Join(dir, name), &st); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		return st
	}
	if a, b := lstat("etc/file"), lstat("etc/hard"); a.Ino != b.Ino || a.Uid != 7 || a.Gid != 8 || a.Mode&0o7777 != 0o640 {
		t.Errorf("file %+v, hard link %+v", a, b)
	}
	if w := lstat("etc/gone"); w.Mode&unix.S_IFMT != unix.S_IFCHR || w.Rdev != 0 {
		t.Errorf("whiteout %+v", w)
	}
	value := make([]byte, 8)
	if n, err := unix.Getxattr(filepath.Join(dir, "etc/sub"), "trusted.overlay.opaque", value); err != nil || string(value[:n]) != "y" {
		t.Errorf("opaque: %q, %v", value[:max(n, 0)], err)
	}
	if n, err := unix.Getxattr(filepath.Join(dir, "etc/file"), "user.note", value); err != nil || string(value[:n]) != "x" {
		t.Errorf("user.note: %q, %v", value[:max(n, 0)], err)
	}
	if target, err := os.Readlink(filepath.Join(dir, "etc/soft")); err != nil || target != "/etc/file" {
		t.Errorf("link %q, %v", target, err)
	}
}

// member is one member of a made-up archive.
type member struct {
	tar.Header
	body string
}

func reg(name, body string) member {
	return member{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(body))}, body}
}

func pack(t *testing.T, ms ...member) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, m := range ms {
		if err := w.WriteHeader(&m.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, m.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func zip(t *testing.T, b []byte) []byte {
	t.Helper()
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return z.Bytes()
}

// criArchive are the members of an archive as the CRI call makes one.
func criArchive(t *testing.T) []member {
	t.Helper()
	spec, err := os.ReadFile(filepath.Join(testImages, "criu42-spec.json"))
	if err != nil {
		t.Fatal(err)
	}
	ms := []member{
		reg("config.dump", `{"id":"4f5a","name":"c","rootfsImageName":"busybox:1"}`), reg("spec.dump", string(spec)),
		reg("status.dump", "{}"), reg("status", "{}"), reg("container.log", "hello"),
		{Header: tar.Header{Typeflag: tar.TypeDir, Name: "checkpoint/", Mode: 0o700}},
	}
	entries, err := os.ReadDir(filepath.Join(testImages, "criu42"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(testImages, "criu42", e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		ms = append(ms, reg("checkpoint/"+e.Name(), string(b)))
	}
	return ms
}

func TestImportHostile(t *testing.T) {
	testenv.Need(t, testenv.Root)
	dir := func(name string) member {
		return member{Header: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}}
	}
	layerOf := func(ms ...member) []member { return []member{reg("rootfs-diff.tar", string(pack(t, ms...)))} }
	other := func(typ byte, name, link string) member {
		return member{Header: tar.Header{Typeflag: typ, Name: name, Linkname: link, Mode: 0o644}}
	}
	manifest := func(old, new string) []member {
		s := newStore(t)
		id := s.addWhole(t, "a")
		b, err := os.ReadFile(filepath.Join(s.Root(), "checkpoints", id[:16], id, checkpoint.ManifestFile))
		if err != nil {
			t.Fatal(err)
		}
		return []member{reg("manifest.json", strings.Replace(string(b), old, new, 1))}
	}
	for name, tc := range map[string]struct {
		more []member
		drop string
		args []string
		want string // part of the error; empty: it is accepted
	}{
		"as it is":               {args: []string{"--assume-this-host"}, want: "criu"}, // no CRIU here, but in CI
		"no digest":              {args: []string{"--assume-this-host", "--image-digest", ""}, want: "--image-digest"},
		"no host":                {want: "--assume-this-host"},
		"too large":              {args: []string{"--max-bytes", "5000"}, want: "--max-bytes"},
		"no spec":                {drop: "spec.dump", want: "no spec.dump"},
		"no config":              {drop: "config.dump", want: "no config.dump"},
		"no inventory":           {drop: "checkpoint/inventory.img", want: "inventory.img"},
		"no pstree":              {drop: "checkpoint/pstree.img", more: manifest("", ""), want: "pstree.img"},
		"climbing":               {more: []member{reg("checkpoint/../../x", "")}, want: "unknown"},
		"absolute":               {more: []member{reg("/etc/passwd", "")}, want: "unknown"},
		"deep":                   {more: []member{reg("checkpoint/a/b", "")}, want: "unknown"},
		"hidden":                 {more: []member{reg("checkpoint/.x", "")}, want: "unknown"},
		"unknown":                {more: []member{reg("x", "")}, want: "unknown"},
		"unknown directory":      {more: []member{dir("x")}, want: "unknown directory"},
		"twice":                  {more: []member{reg("checkpoint/pstree.img", "")}, want: "twice"},
		"symbolic link":          {more: []member{other(tar.TypeSymlink, "checkpoint/x.img", "/etc/shadow")}, want: "regular file"},
		"hard link":              {more: []member{other(tar.TypeLink, "checkpoint/x.img", "spec.dump")}, want: "regular file"},
		"fifo":                   {more: []member{other(tar.TypeFifo, "checkpoint/x.img", "")}, want: "regular file"},
		"bad manifest":           {more: []member{reg("manifest.json", "{}")}, want: "manifest"},
		"manifest without file":  {more: manifest("", ""), want: "no volumes/0.layer"},
		"volumes, no manifest":   {more: []member{reg("volumes/0.layer", "")}, want: "volumes without"},
		"odd volume":             {more: []member{reg("volumes/x", "")}, want: "unknown"},
		"podman's shm":           {more: []member{reg("devshm-checkpoint.tar", "")}, want: "/dev/shm"},
		"layer: climbing":        {more: layerOf(reg("../x", "")), want: "not in the layer"},
		"layer: through a link":  {more: layerOf(other(tar.TypeSymlink, "d", "/tmp"), reg("d/x", "")), want: "not in the layer"},
		"layer: no parent":       {more: layerOf(reg("a/b", "")), want: "not in the layer"},
		"layer: device":          {more: layerOf(member{Header: tar.Header{Typeflag: tar.TypeBlock, Name: "sda", Devmajor: 8}}), want: "device"},
		"layer: raw whiteout":    {more: layerOf(other(tar.TypeChar, "x", "")), want: "whiteout"},
		"layer: overlay's xattr": {more: layerOf(member{Header: tar.Header{Typeflag: tar.TypeDir, Name: "d", PAXRecords: map[string]string{"SCHILY.xattr.trusted.overlay.redirect": "/x"}}}), want: "attribute"},
		"layer: garbage":         {more: []member{reg("rootfs-diff.tar", strings.Repeat("garbage ", 1000))}, want: "rootfs-diff.tar"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			ms := slices.DeleteFunc(criArchive(t), func(m member) bool { return m.Name == tc.drop })
			file := filepath.Join(t.TempDir(), "x.tar")
			if strings.HasPrefix(name, "layer") || name == "no pstree" {
				// So that it gets that far without a CRIU on this machine.
				vol := t.TempDir()
				capture(t, vol, file+".layer")
				b, err := os.ReadFile(file + ".layer")
				if err != nil {
					t.Fatal(err)
				}
				ms = append(ms, reg("volumes/0.layer", string(b)))
				if name != "no pstree" {
					ms = append(ms, manifest("", "")...)
				}
			}
			if err := os.WriteFile(file, pack(t, append(ms, tc.more...)...), 0o600); err != nil {
				t.Fatal(err)
			}
			args := append([]string{"import", file, "-n", "prod", "--key", "b", "--container", "c", "--image-digest", "sha256:bb"}, tc.args...)
			out, errs, code := s.run(args...)
			if name == "as it is" && code == 0 {
				return
			}
			if code != exitFailure || !strings.Contains(errs, tc.want) {
				t.Errorf("exit code %d, want %q\n%s%s", code, tc.want, out, errs)
			}
			if len(s.ids()) != 0 {
				t.Error("it was committed")
			}
			if left, err := filepath.Glob(filepath.Join(s.Root(), ".stage-*")); err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
	}
}

// TestImportCompressed takes what the kubelet makes: rootfs-diff.tar is gzip.
func TestImportCompressed(t *testing.T) {
	testenv.Need(t, testenv.Root)
	s := newStore(t)
	diff := pack(t, member{Header: tar.Header{Typeflag: tar.TypeDir, Name: "etc/", Mode: 0o755}}, reg("etc/x", "y"), reg("etc/.wh.gone", ""))
	u := &unpacker{ctx: context.Background(), dir: t.TempDir(), left: 1 << 20, seen: map[string]bool{}}
	if err := os.Mkdir(filepath.Join(u.dir, checkpoint.ImageDir), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := u.unpack(bytes.NewReader(zip(t, pack(t, append(criArchive(t), reg("rootfs-diff.tar", string(zip(t, diff))))...)))); err != nil {
		t.Fatal(err)
	}
	if n, err := u.convertDiff(); err != nil || n == 0 {
		t.Fatalf("%d bytes, error %v", n, err)
	}
	m := &checkpoint.Manifest{}
	if err := u.describe(m, importOptions{imageDigest: "sha256:bb", assumeHost: true}); err != nil {
		t.Fatal(err)
	}
	if m.ImageName != "busybox:1" || m.ContainerID != "4f5a" || len(m.Fingerprint) == 0 {
		t.Errorf("%+v", m)
	}
	// A small file must not fill the disk.
	bomb := zip(t, pack(t, reg("status.dump", strings.Repeat("0", 200<<20))))
	u = &unpacker{ctx: context.Background(), dir: t.TempDir(), left: 1 << 20, seen: map[string]bool{}}
	if err := u.unpack(bytes.NewReader(bomb)); err == nil || !strings.Contains(err.Error(), "larger") {
		t.Errorf("error %v", err)
	}
	s.fails(exitUsage, "--namespace", "import", "x.tar")
	s.fails(exitUsage, "--key", "import", "x.tar", "-n", "a", "--key", "..", "--container", "c")
}

// FuzzUnpack reads hostile archives: whatever they hold, nothing appears but
// files of known names in the stage.
func FuzzUnpack(f *testing.F) {
	var small bytes.Buffer
	w := tar.NewWriter(&small)
	for _, m := range []member{reg("config.dump", "{}"), reg("spec.dump", `{"process":{}}`), reg("checkpoint/inventory.img", "x"), reg("rootfs-diff.tar", "")} {
		if err := w.WriteHeader(&m.Header); err != nil {
			f.Fatal(err)
		}
		if _, err := io.WriteString(w, m.body); err != nil {
			f.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		f.Fatal(err)
	}
	f.Add(small.Bytes())
	f.Add([]byte{0x1f, 0x8b, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		outer := t.TempDir()
		u := &unpacker{ctx: context.Background(), dir: filepath.Join(outer, "stage"), left: 1 << 20, seen: map[string]bool{}}
		if err := os.MkdirAll(filepath.Join(u.dir, checkpoint.ImageDir), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := u.unpack(bytes.NewReader(data)); err == nil {
			if u.describe(&checkpoint.Manifest{}, importOptions{imageDigest: "sha256:bb", assumeHost: true}) == nil && u.diff != "" {
				_, _ = u.convertDiff()
			}
		}
		entries, err := os.ReadDir(outer)
		if err != nil || len(entries) != 1 {
			t.Fatalf("outside of the stage: %v, %v", entries, err)
		}
		err = filepath.WalkDir(u.dir, func(p string, e os.DirEntry, err error) error {
			if err == nil && !strings.Contains(p, ".rootfs-diff") && !e.IsDir() && !e.Type().IsRegular() {
				t.Errorf("%s is %v", p, e.Type())
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	})
}
